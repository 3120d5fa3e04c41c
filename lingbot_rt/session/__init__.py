"""2. What a session is: messages, settings, controls, camera, plans, and the state machine that ties them together.

No torch, no sockets, no threads and no clock: every time is an argument.
Reading order: ``messages.py``, ``settings.py``, ``controls.py``,
``camera_poses.py``, ``camera_path.py``, ``plan.py``, ``session.py``.
"""
