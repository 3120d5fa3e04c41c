"""Gives the engine to one session at a time. Other clients wait in line.

A waiting client is refused after ``wait_s``, but not while the running session is ending. When a page reloads, its old
session is still there, and interrupting that session's chunk can take longer than ``wait_s``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from lingbot_rt.errors import SessionBusy

LEAVING_LIMIT_S = 30.0
"""Seconds beyond ``wait_s`` that a client waits for a session that is ending."""


TellPlace = Callable[[int], Awaitable[None]]


class Slot:
    """The place of the running session. Call ``leaving`` as soon as the session begins to end."""

    def __init__(self) -> None:
        self.is_leaving = False

    def leaving(self) -> None:
        self.is_leaving = True


@dataclass(eq=False)
class _Ticket:
    """A place in line."""

    position: int = 0
    slot: Slot | None = None  # once it is granted
    changed: asyncio.Event = field(default_factory=asyncio.Event)


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
    async def slot(self, tell_place: TellPlace | None = None) -> AsyncIterator[Slot]:
        """Holds the slot for the block. Clients get it in the order in which they came.

        ``tell_place(position)`` is awaited with each new place in line; 1 is next. Raises SessionBusy when the wait is
        over.
        """
        slot = await self._acquire(tell_place)
        try:
            yield slot
        finally:
            self._pass_on()

    async def _acquire(self, tell_place: TellPlace | None) -> Slot:
        if self._holder is None:
            self._holder = Slot()
            return self._holder
        ticket = _Ticket()
        self._line.append(ticket)
        self._number_places()
        entered = False
        try:
            slot = await self._wait(ticket, tell_place)
            entered = True
            return slot
        finally:
            if ticket in self._line:
                self._line.remove(ticket)
                self._number_places()
            elif not entered:
                # Cancelled or refused in the same turn in which the slot was granted: the next client gets it.
                self._pass_on()

    async def _wait(self, ticket: _Ticket, tell_place: TellPlace | None) -> Slot:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        last_moment = deadline + self._leaving_limit_s
        told = 0
        while ticket.slot is None:
            if tell_place is not None and ticket.position != told:
                told = ticket.position
                await tell_place(told)
                continue
            now = loop.time()
            leaving = self._holder is not None and self._holder.is_leaving
            if now >= (last_moment if leaving else deadline):
                raise SessionBusy
            # Past the deadline the wait goes on only while the holder is leaving, so look again soon.
            ticket.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline - now if now < deadline else 0.05):
                    await ticket.changed.wait()
        return ticket.slot

    def _pass_on(self) -> None:
        self._holder = None
        if self._line:
            ticket = self._line.pop(0)
            self._holder = Slot()
            ticket.slot = self._holder
            ticket.changed.set()
            self._number_places()

    def _number_places(self) -> None:
        for position, ticket in enumerate(self._line, start=1):
            if ticket.position != position:
                ticket.position = position
                ticket.changed.set()
