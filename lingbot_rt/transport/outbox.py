"""What leaves one socket: messages that belong together stay together, one group at a time.

Nothing waits here. Whoever sends waits until the socket has taken the bytes, so a client that reads slowly slows the
task that makes frames for it and no queue can grow. Frames are never dropped while a session lives.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from lingbot_rt.session.session import SendTimes


class Write(Protocol):
    async def __call__(self, data: bytes, *, more: bool) -> None:
        """Sends one message. ``more``: another one follows at once, so this one need not have left on return."""


class Outbox:
    """Every task of a connection sends through its one outbox; groups leave in the order of the calls."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._lock = asyncio.Lock()
        self.pending_bytes = 0  # of messages in calls of `send` that have not returned

    async def send(self, *messages: bytes) -> SendTimes:
        """Returns when the last message has left. Raises what the socket raises."""
        size = sum(map(len, messages))
        self.pending_bytes += size
        try:
            async with self._lock:
                begin = first_at = time.monotonic()
                for number, message in enumerate(messages, start=1):
                    await self._write(message, more=number < len(messages))
                    if number == 1:
                        first_at = time.monotonic()
                end = time.monotonic()
        finally:
            self.pending_bytes -= size
        return SendTimes(1000 * (first_at - begin), 1000 * (end - first_at), end)
