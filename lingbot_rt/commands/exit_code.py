"""Exit codes of ``lingbot-rt``: 0 done, 1 failed on the way, 2 what was asked for cannot be."""

from __future__ import annotations

from lingbot_rt.errors import LingbotError

FAILED = 1
BAD_USAGE = 2

_WRONGLY_ASKED = ("config", "checkpoint", "invalid_init")


def exit_code(error: LingbotError) -> int:
    return BAD_USAGE if error.code in _WRONGLY_ASKED else FAILED
