"""Who holds the engine: one live session, a line of those who wait.

A waiting client is refused after ``wait_s``, but that clock stands while the holder is on its way out: a page that
reloads meets its own old socket there, and freeing an interrupted chunk can take longer than the wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lingbot_rt.errors import SessionBusy

LEAVING_LIMIT_S = 30.0
"""Longest a departing session may hold up the line."""


class Slot:
    """What the holder has. Call ``leaving`` as soon as its client is gone."""

    def __init__(self) -> None:
        self.is_leaving = False

    def leaving(self) -> None:
        self.is_leaving = True


@dataclass(eq=False)
class _Ticket:
    """A place in line."""

    granted: asyncio.Future[Slot]
    moved: Callable[[int], None]
    position: int = field(default=0)


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
        """Holds the slot for the block; first come, first served.

        ``moved(position)`` tells each new place in line, 1 is next. Raises SessionBusy when the wait is over.
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
            # Cancelled or refused in the same turn in which the slot was handed over: it goes on to the next.
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
            # While someone leaves, look again shortly: the next in line may have become the holder.
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
