"""How a connection ends: its close code, what its client is told, and whether the client may come back."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import WebSocketDisconnect

from lingbot_rt.errors import (
    ClientTooSlow,
    EngineFailed,
    LingbotError,
    MessageTooLarge,
    PauseExpired,
    SessionBusy,
    ShuttingDown,
)

log = logging.getLogger(__name__)

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


async def closed_by(work: Coroutine[Any, Any, Close]) -> Close:
    """The edge of a connection: what ``work`` raises becomes the close that tells the client about it."""
    try:
        return await work
    except (WebSocketDisconnect, ClientTooSlow) as error:
        log.info("the client is gone: %r", error)
        return TOO_SLOW if isinstance(error, ClientTooSlow) else LOST
    except SessionBusy as error:
        return Close(1008, "busy", error)
    except PauseExpired as error:
        return Close(1008, "paused too long", error)
    except MessageTooLarge as error:
        return Close(1009, "message too large", error)
    except LingbotError as error:
        log.error("session failed: %s", error)
        return Close(1011, "engine error", error)
    except Exception as error:
        log.exception("the connection broke")
        # The text of an unexpected error is for the log: it may hold paths of this machine.
        return Close(1011, "internal error", EngineFailed(f"{type(error).__name__}; the server's log has more"))
