"""The engine's time, chunk by chunk: of the sessions that want it, the one whose frames are due first gets it."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import Protocol, TypeVar

from lingbot_rt.server.admission import Admission
from lingbot_rt.session.plan import ChunkRun


class HasRun(Protocol):
    @property
    def run(self) -> ChunkRun: ...


Started = TypeVar("Started", bound=HasRun)


class Turns:
    """All methods are called from one event loop. At most one caller per session waits."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_taken = False
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap
        self._order = count()
        self._running: set[asyncio.Task[None]] = set()  # at most one

    @property
    def is_shared(self) -> bool:
        """Whether several sessions may have the engine at the same time."""
        return self._admission.slots > 1

    @property
    def sessions(self) -> int:
        """How many sessions have the engine now."""
        return self._admission.running

    async def begin(self, due_at: float, start: Callable[[], Started | None]) -> Started | None:
        """Calls ``start`` when it is the session's turn; the turn lasts until the chunk that it started has finished.

        ``due_at``: when the chunk's frames are wanted, in seconds of one clock. What is wanted at once is due now: so
        nobody waits for ever behind sessions that always want more. ``start`` may find that nothing is to be started
        any more, and return None.
        """
        await self._acquire(due_at)
        started = None
        try:
            started = start()
        finally:
            if started is None:
                self._pass_on()
        if started is not None:
            task = asyncio.create_task(self._until_finished(started.run), name="turn")
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return started

    async def _acquire(self, due_at: float) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (due_at, next(self._order), granted)
        heapq.heappush(self._waiting, entry)
        try:
            await granted
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            elif not granted.cancelled():
                self._pass_on()  # granted in the same turn of the loop in which it was cancelled
            raise

    async def _until_finished(self, run: ChunkRun) -> None:
        try:
            await run.finished()
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():
                granted.set_result(None)
                return
        self._is_taken = False
