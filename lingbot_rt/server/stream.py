"""THE PAGE TO READ: the serving loop, from a session's next plan to frames and statistics on the socket.

Two things run ahead of the loop, each by one: the engine runs chunk N + 1 while the frames of chunk N leave, and a
batch is encoded while the batch before it is sent. A client that reads slowly slows its own session only, and no queue
can grow.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lingbot_rt.recording.record_file import RecordedEvent
from lingbot_rt.recording.session_record import SessionRecorder
from lingbot_rt.session.plan import ChunkRun, EnginePort
from lingbot_rt.session.server_messages import EncodedBatch, stats_fields
from lingbot_rt.session.session import Chunk, Session
from lingbot_rt.telemetry.session import SessionTelemetry
from lingbot_rt.transport.encode import FrameEncoder
from lingbot_rt.transport.outbox import Outbox
from lingbot_rt.transport.pacing import Pacer

Item = TypeVar("Item")


class Stream:
    """Serves one opened session until it is complete."""

    def __init__(
        self,
        session: Session,
        engine: EnginePort,
        outbox: Outbox,
        *,
        encoders: Executor,
        telemetry: SessionTelemetry,
        recorder: SessionRecorder | None = None,
    ) -> None:
        self._session = session
        self._engine = engine
        self._outbox = outbox
        self._encoders = encoders
        self._telemetry = telemetry
        self._recorder = recorder
        self._encoder = FrameEncoder(session.settings.output)
        settings = session.settings
        self._pacer = Pacer(settings.playback_fps if settings.pacing else math.inf, session.usual_frames)
        self._woken = asyncio.Event()
        self._first_frames_s = 0.0  # from the start of the newest chunk to its first frames

    async def run(self) -> None:
        """Returns after the last chunk of a session with ``max_chunks``. Raises what the engine or the socket raised,
        after everything that was generated before has been sent."""
        async with Prefetch(self._chunks()) as chunks:
            async for chunk, run in chunks:
                frames: list[npt.NDArray[np.uint8]] = []
                async with Prefetch(self._batches(chunk, run, frames)) as batches:
                    async for batch in batches:
                        pace_wait_ms = await self._pacer.until_due(batch.num_frames, chunk.plan.event_id)
                        sent = await self._outbox.send(*self._session.frame_batch(chunk, batch))
                        self._session.sent(chunk, sent, pace_wait_ms)
                await self._outbox.send(self._session.stats(chunk, run.result))
                self._report(chunk, run, frames)

    def wake(self) -> None:
        """To be called after every event: whoever waits looks again."""
        self._woken.set()
        self._pacer.wake()

    async def _chunks(self) -> AsyncGenerator[tuple[Chunk, ChunkRun], None]:
        """Plans and starts chunk after chunk, each as late as it may: keys are sampled fresh."""
        run: ChunkRun | None = None
        while not self._session.is_complete:
            asked_at = time.monotonic()
            idle_since = await run.finished() if run is not None else asked_at
            pace_wait_ms = await self._may_start()
            now = time.monotonic()
            chunk = self._session.next_chunk(now)
            run = self._engine.run(chunk.plan)
            chunk.stats.request_prepare_ms = 1000 * (time.monotonic() - now)
            chunk.stats.queue_wait_ms = 1000 * max(asked_at - idle_since, 0.0)
            chunk.stats.pace_wait_ms = pace_wait_ms
            self._pacer.plan(chunk.num_frames)
            await self._outbox.send(*chunk.acknowledgements)
            yield chunk, run

    async def _may_start(self) -> float:
        """The one place that decides when the next chunk may start, once the engine is free; what pacing took, in ms.

        ``Prefetch`` has seen to it that no more than one chunk before it is unsent. A paused session starts none. A
        paced one waits as long as its frames would have to wait anyway, or for an event: its frames are due at once.
        """
        while True:
            while self._session.is_paused:
                self._woken.clear()
                await self._woken.wait()
            pace_wait_ms = await self._pacer.until_worth_starting(self._first_frames_s)
            if not self._session.is_paused:
                return pace_wait_ms

    async def _batches(
        self, chunk: Chunk, run: ChunkRun, frames: list[npt.NDArray[np.uint8]]
    ) -> AsyncGenerator[EncodedBatch, None]:
        """The encoded batches of a chunk, as its frames come out of the engine."""
        loop = asyncio.get_running_loop()
        is_first = True
        async for group in run:
            if is_first:
                self._first_frames_s, is_first = time.monotonic() - chunk.begun_at, False
            if self._recorder is not None:
                frames.append(group.pixels)
            for pixels in self._encoder.split(group.pixels):
                begin = time.monotonic()
                batch = await loop.run_in_executor(self._encoders, self._encoder.encode, pixels, chunk.plan.event_id)
                chunk.stats.raw_payload_build_ms += 1000 * (time.monotonic() - begin)
                yield batch

    def _report(self, chunk: Chunk, run: ChunkRun, frames: list[npt.NDArray[np.uint8]]) -> None:
        """To the record, the metrics and the trace."""
        stats = chunk.stats
        if self._recorder is not None:
            events = [RecordedEvent(*event) for event in chunk.events]
            self._recorder.chunk(stats.chunk_index, events, stats.event_id, frames, stats_fields(stats))
        self._telemetry.sent(chunk, run.result)


class Prefetch(Generic[Item]):
    """A queue of length one: runs ``source`` one item ahead of its user.

    Used as ``async with Prefetch(source) as items: async for item in items``. The next item is begun when the one
    before is taken, never earlier. What ``source`` raises is raised in its place, after the items that came before it.
    Leaving the block stops ``source``.
    """

    def __init__(self, source: AsyncGenerator[Item, None]) -> None:
        self._source = source
        self._next: asyncio.Task[Item | None] | None = None

    async def __aenter__(self) -> Prefetch[Item]:
        self._next = asyncio.create_task(self._make())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._next is not None
        self._next.cancel()
        await asyncio.wait({self._next})
        if not self._next.cancelled():
            self._next.exception()  # nobody asked for the item any more, nor for what went wrong with it
        await self._source.aclose()

    def __aiter__(self) -> Prefetch[Item]:
        return self

    async def __anext__(self) -> Item:
        assert self._next is not None
        item = await self._next
        if item is None:
            raise StopAsyncIteration
        self._next = asyncio.create_task(self._make())
        return item

    async def _make(self) -> Item | None:
        """The next item; None at the end."""
        return await anext(self._source, None)
