"""A chunk in work, as the event loop sees it. No torch: tests run other engines through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from lingbot_rt.session.plan import ChunkResult, FrameGroup

Emit = Callable[[FrameGroup], None]
"""Takes the frames of one latent frame, on any thread, and returns at once."""


class ThreadedChunkRun:
    """``session.plan.ChunkRun`` of work on another thread. ``work(emit)`` is begun at once.

    It holds the frames of its own chunk and no more, however late they are asked for.
    """

    def __init__(self, work: Callable[[Emit], Awaitable[ChunkResult]]) -> None:
        self._groups: asyncio.Queue[FrameGroup | None] = asyncio.Queue()  # None: no more come
        self._finished_at = 0.0
        self._task = asyncio.create_task(self._run(work))

    def __aiter__(self) -> ThreadedChunkRun:
        return self

    async def __anext__(self) -> FrameGroup:
        group = await self._groups.get()
        if group is None:
            self._groups.put_nowait(None)  # for who comes later: a session that is parked settles its broken chunk too
            self._task.result()
            raise StopAsyncIteration
        return group

    @property
    def result(self) -> ChunkResult:
        return self._task.result()

    async def finished(self) -> float:
        await asyncio.wait({self._task})
        return self._finished_at

    async def _run(self, work: Callable[[Emit], Awaitable[ChunkResult]]) -> ChunkResult:
        loop = asyncio.get_running_loop()
        try:
            return await work(lambda group: _post(loop, self._groups, group))
        finally:
            self._finished_at = time.monotonic()
            # After this turn: the task is done by the time that anybody sees the end.
            loop.call_soon(self._end)

    def _end(self) -> None:
        if not self._task.cancelled():
            self._task.exception()  # a session that is gone does not ask how its chunk ended
        self._groups.put_nowait(None)


def _post(loop: asyncio.AbstractEventLoop, groups: asyncio.Queue[FrameGroup | None], group: FrameGroup) -> None:
    loop.call_soon_threadsafe(groups.put_nowait, group)
