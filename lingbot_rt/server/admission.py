"""Gives the engine to one session at a time. Other clients wait in line.

A waiting client is refused after ``wait_s``, but not while the running session is ending. When a page reloads, its old
session is still there, and interrupting that session's chunk can take longer than ``wait_s``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from lingbot_rt.errors import SessionBusy

LEAVING_LIMIT_S = 30.0
"""Seconds beyond ``wait_s`` that a client waits for a session that is ending."""


class Slot:
    """The place of the running session. Call ``leaving`` as soon as the session begins to end."""

    def __init__(self) -> None:
        self.is_leaving = False

    def leaving(self) -> None:
        self.is_leaving = True


@dataclass(eq=False)
class _Ticket:
    """A place in line."""

    granted: asyncio.Future[Slot]
    moved: Callable[[int], None]
    position: int = 0


class Admission:
    """All methods are called from one event loop."""

    def __init__(self, wait_s: float, leaving_limit_s: float = LEAVING_LIMIT_S) -> None:
        self._wait_s = wait_s
        self._leaving_limit_s = leaving_limit_s
        self._holder: Slot | None = None
        self._line: list[_Ticket] = []

    @property
    def is_busy(self) -> bool:
        return self._holder is not None

    @property
    def waiting(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def slot(self, moved: Callable[[int], None] = lambda position: None) -> AsyncIterator[Slot]:
        """Holds the slot for the block. Clients get it in the order in which they came.

        ``moved(position)`` is called with each new place in line; 1 is next. Raises SessionBusy when the wait is over.
        """
        slot = await self._acquire(moved)
        try:
            yield slot
        finally:
            self._pass_on()

    async def _acquire(self, moved: Callable[[int], None]) -> Slot:
        if self._holder is None:
            self._holder = Slot()
            return self._holder
        ticket = _Ticket(asyncio.get_running_loop().create_future(), moved)
        self._line.append(ticket)
        self._tell_places()
        try:
            return await self._wait(ticket)
        except BaseException:
            # Cancelled or refused in the same turn in which the slot was granted: the next client gets it.
            if ticket.granted.done() and not ticket.granted.cancelled():
                self._pass_on()
            raise
        finally:
            if ticket in self._line:
                self._line.remove(ticket)
                self._tell_places()

    async def _wait(self, ticket: _Ticket) -> Slot:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        last_moment = deadline + self._leaving_limit_s
        while not ticket.granted.done():
            now = loop.time()
            leaving = self._holder is not None and self._holder.is_leaving
            if now >= (last_moment if leaving else deadline):
                raise SessionBusy
            # Past the deadline the wait goes on only while the holder is leaving, so look again soon.
            await asyncio.wait([ticket.granted], timeout=min(deadline - now, 1) if now < deadline else 0.05)
        return ticket.granted.result()

    def _pass_on(self) -> None:
        self._holder = None
        if self._line:
            ticket = self._line.pop(0)
            self._holder = Slot()
            ticket.granted.set_result(self._holder)
            self._tell_places()

    def _tell_places(self) -> None:
        for position, ticket in enumerate(self._line, start=1):
            if ticket.position != position:
                ticket.position = position
                ticket.moved(position)
