"""Sessions on disk: the init, every event with the chunk it took effect in, and a hash of every frame.

``record_file.py`` defines and reads the format. ``session_record.py`` writes it while a session runs.
"""
