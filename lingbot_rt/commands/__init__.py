"""The verbs of ``lingbot-rt``, one module per verb, and their exit codes.

A verb's module has ``add_arguments(parser)`` and ``run(args) -> exit code``. It imports heavy packages inside ``run``.
"""

from lingbot_rt.errors import CheckpointError, ConfigError, InitRefused, InvalidInit, LingbotError

VERBS = {
    "serve": "serve a world model: HTTP, WebSocket and the web page",
    "play": "open the web page; start a server first when none answers",
    "client": "run one session on a server, measure it, save its frames",
    "generate": "generate a video without a server",
    "bench": "measure the pipeline, the transports or a running server",
    "check": "record the frames of one build, compare later builds with them",
    "replay": "run a recorded session again and compare every frame",
    "doctor": "show versions, devices, attention kernels and which models fit",
}

FAILED = 1
"""The work failed, or a comparison found a difference."""

BAD_USAGE = 2
"""The command line, the configuration or the model folder is wrong."""

INTERRUPTED = 130
"""Ctrl-C, as shells report it."""

READER_GONE = 141
"""The reader of standard output ended first, as shells report a broken pipe."""


def exit_code(error: LingbotError) -> int:
    """BAD_USAGE if the caller has to change what they asked for, else FAILED."""
    return BAD_USAGE if isinstance(error, (ConfigError, CheckpointError, InvalidInit, InitRefused)) else FAILED
