"""The verbs of ``lingbot-rt``: one module each, imported when called.

A module has ``add_arguments(parser)`` and ``run(args) -> exit code``, and imports what is heavy inside ``run``.
"""

VERBS = {
    "serve": "serve a world model: HTTP, WebSocket and the web page",
    "client": "walk through a served world from the command line, measure it, keep the frames",
    "generate": "make a clip without a server",
    "bench": "measure the pipeline on this device, the transports, or a server",
    "check": "keep the frames of a build as ground truth, compare later builds with them",
    "replay": "run a recorded session again and compare every frame",
    "doctor": "tell what this machine has and what would run on it",
}
