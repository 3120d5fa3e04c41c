"""Gives slots to sessions, one by default. Other clients wait in line, and get one in the order in which they came.

A client that hears its place in line waits without a limit; at most ``max_waiting`` clients do so at a time. Any other
client is refused after ``wait_s``, but not while a running session is ending. When a page reloads, its old session is
still there, and interrupting that session's chunk can take longer than ``wait_s``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from lingbot_rt.errors import SessionBusy

LEAVING_LIMIT_S = 30.0
"""Seconds beyond ``wait_s`` that a client waits for a session that is ending."""

LOOK_AGAIN_S = 0.05
"""How soon a client past ``wait_s`` looks whether the running session is still ending."""

REMINDER_S = 5.0
"""How often a client hears its place in line while that does not change."""

TellPlace = Callable[[int, float], Awaitable[None]]
"""Called with the place in line, where 1 is next and 0 is the slot, and the seconds waited so far."""


class Slot:
    """The place of a running session. Call ``leaving`` as soon as the session begins to end."""

    def __init__(self) -> None:
        self.is_leaving = False

    def leaving(self) -> None:
        self.is_leaving = True


@dataclass(eq=False)
class _Ticket:
    """A place in line."""

    joined_at: float
    tell_place: TellPlace | None  # None: the wait is limited
    position: int = 0
    slot: Slot | None = None  # once it is granted
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        self._changed.set()

    async def change_before(self, moment: float) -> None:
        """Returns when the position or the slot changes, at ``moment`` at the latest."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(moment):
                await self._changed.wait()


class Admission:
    """All methods are called from one event loop."""

    def __init__(
        self, wait_s: float, max_waiting: int, leaving_limit_s: float = LEAVING_LIMIT_S, slots: int = 1
    ) -> None:
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._leaving_limit_s = leaving_limit_s
        self.slots = slots
        self._holders: list[Slot] = []
        self._line: list[_Ticket] = []

    @property
    def is_busy(self) -> bool:
        """Whether every slot is taken."""
        return len(self._holders) >= self.slots

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._holders)

    @property
    def waiting(self) -> int:
        """The length of the line."""
        return len(self._line)

    @asynccontextmanager
    async def slot(self, tell_place: TellPlace | None = None) -> AsyncIterator[Slot]:
        """Holds a slot for the block.

        With ``tell_place`` the client waits as long as it takes. It is awaited with each new place in line, and every
        ``REMINDER_S`` seconds. Without it, or when ``max_waiting`` clients wait so already, SessionBusy is raised when
        the limited wait is over.
        """
        slot = await self._acquire(tell_place)
        try:
            yield slot
        finally:
            self._pass_on(slot)

    async def _acquire(self, tell_place: TellPlace | None) -> Slot:
        if not self.is_busy:
            return self._new_slot()
        is_full = sum(ticket.tell_place is not None for ticket in self._line) >= self._max_waiting
        ticket = _Ticket(asyncio.get_running_loop().time(), None if is_full else tell_place)
        self._line.append(ticket)
        self._number_places()
        entered = False
        try:
            if ticket.tell_place is not None:
                await self._wait_in_line(ticket, ticket.tell_place)
            elif not await self._wait_briefly(ticket):
                raise SessionBusy(self._max_waiting if tell_place is not None else None)
            assert ticket.slot is not None
            entered = True
            return ticket.slot
        finally:
            if ticket in self._line:
                self._line.remove(ticket)
                self._number_places()
            elif not entered and ticket.slot is not None:
                # Cancelled or refused in the same turn in which the slot was granted: the next client gets it.
                self._pass_on(ticket.slot)

    async def _wait_in_line(self, ticket: _Ticket, tell_place: TellPlace) -> None:
        """Returns when the slot is granted."""
        loop = asyncio.get_running_loop()
        told, due_at = 0, ticket.joined_at
        while ticket.slot is None:
            now = loop.time()
            if ticket.position != told or now >= due_at:
                told, due_at = ticket.position, now + REMINDER_S
                await tell_place(told, now - ticket.joined_at)
            else:
                await ticket.change_before(due_at)
        await tell_place(0, loop.time() - ticket.joined_at)

    async def _wait_briefly(self, ticket: _Ticket) -> bool:
        """Whether the slot was granted in time."""
        loop = asyncio.get_running_loop()
        deadline = ticket.joined_at + self._wait_s
        while ticket.slot is None:
            now = loop.time()
            is_leaving = any(holder.is_leaving for holder in self._holders)
            if now >= deadline + (self._leaving_limit_s if is_leaving else 0):
                return False
            # Past the deadline the wait goes on only while a holder is leaving, so look again soon.
            await ticket.change_before(deadline if now < deadline else now + LOOK_AGAIN_S)
        return True

    def _new_slot(self) -> Slot:
        self._holders.append(Slot())
        return self._holders[-1]

    def _pass_on(self, slot: Slot) -> None:
        self._holders.remove(slot)
        if self._line:
            ticket = self._line.pop(0)
            ticket.slot = self._new_slot()
            ticket.change()
            self._number_places()

    def _number_places(self) -> None:
        for position, ticket in enumerate(self._line, start=1):
            if ticket.position != position:
                ticket.position = position
                ticket.change()
