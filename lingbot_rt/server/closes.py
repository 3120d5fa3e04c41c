"""How a connection ends: its close code, what its client is told, and whether the client may come back."""

from __future__ import annotations

from dataclasses import dataclass

from lingbot_rt.errors import LingbotError, ShuttingDown

_ABNORMAL = 1006
_INTENDED = (1000, 1005)
"""Close codes of a client that meant to leave; 1005: its close had none."""


@dataclass(frozen=True, slots=True)
class Close:
    """How a connection ends."""

    code: int
    reason: str = ""
    error: LingbotError | None = None  # sent before the close
    parks: bool = False  # the session is kept for a client that comes back

    @property
    def is_told(self) -> bool:
        """False when nobody is there to be told."""
        return self.code != _ABNORMAL

    @property
    def ending(self) -> str:
        """One word for metrics and logs: the code of the error, or how the connection ended without one."""
        if self.error is not None:
            return self.error.code
        return "complete" if self is COMPLETE else self.reason.replace(" ", "_")


COMPLETE = Close(1000, "generation complete")
LEFT = Close(_ABNORMAL, "client gone")
LOST = Close(_ABNORMAL, "client gone", parks=True)
TOO_SLOW = Close(_ABNORMAL, "client too slow", parks=True)


def shut_down(*, parks: bool) -> Close:
    return Close(1001, "server shutdown", ShuttingDown("the server is shutting down"), parks)


def closed_by_client(code: int) -> Close:
    """``code``: of the client's close, or 1006 when the line broke."""
    return LEFT if code in _INTENDED else LOST
