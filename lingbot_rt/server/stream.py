"""THE PAGE TO READ: the serving loop, from a session's next plan to frames and statistics on the socket.

Two things run ahead of the loop, each by one: the engine runs chunk N + 1 while the frames of chunk N leave, and a
batch is encoded while the batch before it is sent. A client that reads slowly slows its own session only, and no queue
can grow. What a client asks for between two chunks, such as going back, is done where the next one would start.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lingbot_rt.errors import LingbotError, RequestError
from lingbot_rt.recording.record_file import RecordedEvent
from lingbot_rt.server.live_session import LiveSession, NewChunk, Pixels, Received
from lingbot_rt.server.turns import Turns
from lingbot_rt.session.history import Asked
from lingbot_rt.session.plan import EnginePort
from lingbot_rt.session.server_messages import EncodedBatch, Share, stats_fields
from lingbot_rt.session.session import Chunk
from lingbot_rt.transport.encode import FrameEncoder
from lingbot_rt.transport.outbox import Outbox
from lingbot_rt.transport.pacing import Pacer

Item = TypeVar("Item")


@dataclass(frozen=True)
class Link:
    """What a stream needs of the connection that it goes over."""

    outbox: Outbox
    encoders: Executor
    refuse: Callable[[LingbotError], bytes]  # the message of an error, counted
    at_boundary: Callable[[], Awaitable[None]]  # called when no chunk is in work and the next one may start


class Stream:
    """Serves one opened session until it is complete, or until ``finish``."""

    def __init__(self, live: LiveSession, engine: EnginePort, turns: Turns, link: Link) -> None:
        self._live = live
        self._session = live.session
        self._engine = engine
        self._turns = turns
        self._link = link
        self._outbox = link.outbox
        self._woken = asyncio.Event()
        self._is_finishing = False
        self._first_frames_s = 0.0  # from the start of the newest chunk to its first frames
        self._begin_line()

    def _begin_line(self) -> None:
        """The next frame does not follow the one that was sent last."""
        settings = self._session.settings
        self._encoder = FrameEncoder(settings.output)
        self._pacer = Pacer(settings.playback_fps if settings.pacing else math.inf, self._session.usual_frames)

    async def run(self, received: Received | None = None) -> None:
        """Returns after the last chunk of a session with ``max_chunks``. Raises what the engine or the socket raised,
        after everything that was generated before has been sent. ``received``: what a client that is back has got."""
        await self._send_again(received)
        async with Prefetch(self._chunks()) as chunks:
            async for new in chunks:
                await self._send(new, new.chunk, self._out_of_engine(new))
                await self._tell(new, new.chunk)

    def wake(self) -> None:
        """To be called after every event: whoever waits looks again."""
        self._woken.set()
        self._pacer.wake()

    def finish(self) -> None:
        """No further chunk is begun; ``run`` returns once those in work have been sent."""
        self._is_finishing = True
        self.wake()

    async def _chunks(self) -> AsyncGenerator[NewChunk, None]:
        """Plans and starts chunk after chunk, each as late as it may: keys are sampled fresh."""
        new: NewChunk | None = None
        while True:
            asked_at = time.monotonic()
            idle_since = await new.run.finished() if new is not None else asked_at
            pace_wait_ms = await self._may_start()
            if pace_wait_ms is None:
                return
            ready_at = time.monotonic()
            new = await self._turns.begin(self._pacer.due_at, self._begin)
            if new is None:
                continue
            stats = new.chunk.stats
            stats.queue_wait_ms = 1000 * max(asked_at - idle_since, 0.0)
            stats.pace_wait_ms = pace_wait_ms
            if self._turns.is_shared and "session" in self._session.settings.extensions:
                stats.share = Share(self._turns.sessions, 1000 * (new.chunk.begun_at - ready_at))
            await self._outbox.send(*new.chunk.acknowledgements)
            yield new

    def _begin(self) -> NewChunk | None:
        """Samples the next chunk and starts it; None when something came up while it waited for its turn."""
        if self._is_held_up:
            return None
        now = time.monotonic()
        chunk = self._session.next_chunk(now)
        new = self._live.begin(chunk, self._engine.run(chunk.plan))
        chunk.stats.request_prepare_ms = 1000 * (time.monotonic() - now)
        self._pacer.plan(chunk.num_frames)
        return new

    @property
    def _is_held_up(self) -> bool:
        return self._session.is_paused or self._session.has_asked or self._is_finishing

    async def _may_start(self) -> float | None:
        """The one place that decides when the next chunk may start, once the engine is free; what pacing took, in ms.
        None: there is no next one.

        ``Prefetch`` has seen to it that no more than one chunk before it is unsent. A paused session starts none. A
        paced one waits as long as its frames would have to wait anyway, or for an event: its frames are due at once.
        """
        while True:
            self._woken.clear()
            await self._do_asked()
            if self._session.is_complete or self._is_finishing:
                return None
            if self._session.is_paused:
                await self._woken.wait()
                continue
            await self._link.at_boundary()
            pace_wait_ms = await self._pacer.until_worth_starting(self._first_frames_s)
            if not self._is_held_up:
                return pace_wait_ms

    async def _do_asked(self) -> None:
        """What the client asked for, now that no chunk is in work."""
        while (asked := self._session.take_asked()) is not None:
            try:
                answers = await (self._save(asked) if asked.kind == "save" else self._go_back(asked))
            except RequestError as error:
                error.event_id = asked.event_id
                answers = (self._link.refuse(error), *self._session.not_done(asked))
            await self._outbox.send(*answers)

    async def _save(self, asked: Asked) -> tuple[bytes, ...]:
        return self._session.saved(asked, await self._engine.snapshot(self._session.id, self._live.about()))

    async def _go_back(self, asked: Asked) -> tuple[bytes, ...]:
        """To the end also when the line is lost: engine and session must stand at the same place."""

        async def go_back() -> tuple[bytes, ...]:
            self._session.require_kept(asked)
            place = await self._engine.rewind(self._session.id, asked.chunk, asked.branch, asked.kind == "branch")
            answers = self._session.gone_back(asked, place)
            self._live.newest.clear()
            self._begin_line()
            return answers

        answers = await to_the_end(go_back())
        await self._live.end_record("the session went back to an earlier chunk")
        return answers

    async def _out_of_engine(self, new: NewChunk) -> AsyncGenerator[Pixels, None]:
        """The frames of each latent frame of a chunk, as soon as they are out."""
        async for group in new.run:
            if not new.has_begun:
                new.has_begun, self._first_frames_s = True, time.monotonic() - new.chunk.begun_at
            if self._live.is_kept or self._live.recorder is not None:
                new.groups.append(group.pixels)
            yield group.pixels
        new.is_out = True

    async def _batches(
        self, chunk: Chunk, groups: AsyncGenerator[Pixels, None], encoder: FrameEncoder
    ) -> AsyncGenerator[EncodedBatch, None]:
        """The encoded batches of a chunk, as its frames come."""
        loop = asyncio.get_running_loop()
        async with aclosing(groups):
            async for group in groups:
                for pixels in encoder.split(group):
                    begin = time.monotonic()
                    batch = await loop.run_in_executor(self._link.encoders, encoder.encode, pixels, chunk.plan.event_id)
                    chunk.stats.raw_payload_build_ms += 1000 * (time.monotonic() - begin)
                    yield batch

    async def _send(self, new: NewChunk, chunk: Chunk, groups: AsyncGenerator[Pixels, None]) -> None:
        """The frames of a chunk, unless the session has gone back meanwhile."""
        if not self._session.is_current(chunk):
            return
        async with Prefetch(self._batches(chunk, groups, self._encoder)) as batches:
            async for batch in batches:
                pace_wait_ms = await self._pacer.until_due(batch.num_frames, chunk.plan.event_id)
                if not self._session.is_current(chunk):
                    return
                sent = await self._outbox.send(*self._session.frame_batch(chunk, batch))
                new.num_sent += batch.num_frames
                self._session.sent(chunk, sent, pace_wait_ms)

    async def _tell(self, new: NewChunk, chunk: Chunk) -> None:
        """The statistics of a chunk whose frames have left: to the client, the record, the metrics and the trace."""
        if not self._session.is_current(chunk):
            return
        is_first = not new.is_told
        await self._outbox.send(self._session.stats(chunk, new.run.result))
        new.is_told = True
        if not is_first:
            return
        if self._live.recorder is not None:
            events = [RecordedEvent(*event) for event in chunk.events]
            stats = chunk.stats
            self._live.recorder.chunk(stats.chunk_index, events, stats.event_id, [*new.groups], stats_fields(stats))
        if not self._live.is_kept:
            new.groups.clear()
        self._live.telemetry.sent(chunk, new.run.result)

    async def _send_again(self, received: Received | None) -> None:
        """What was generated before the line was lost and has not reached the client."""
        for new, groups in self._live.to_resend(received):
            chunk = new.chunk  # whose statistics are all that is missing, or
            if groups:
                chunk = self._session.again(new.chunk, [len(group) for group in groups], time.monotonic())
                new.num_sent = new.chunk.num_frames - chunk.num_frames
                await self._send(new, chunk, _each(groups))
            await self._tell(new, chunk)


async def _each(groups: list[Pixels]) -> AsyncGenerator[Pixels, None]:
    for group in groups:
        yield group


async def to_the_end(work: Coroutine[Any, Any, Item]) -> Item:
    """Waits for ``work`` even if it is cancelled meanwhile."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


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
