"""A live session at work: plan, run, encode, hand to the outbox, report. One task for each of the verbs.

                plan            FrameGroup             Parcel
    generate ---------> engine ------------> encode ------------> outbox
        ^                                       | last one sent
        +------------- lead ------------ report-+

The lead bounds everything: a chunk is planned only while at most one other is not wholly sent, so a client that reads
slowly slows its own session and no queue can grow.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lingbot_rt.errors import EngineFailed
from lingbot_rt.recording.record_file import RecordedEvent
from lingbot_rt.recording.session_record import SessionRecorder
from lingbot_rt.session.messages import (
    ChunkStats,
    batch_messages,
    control_ack_message,
    stats_fields,
    stats_message,
)
from lingbot_rt.session.plan import ChunkResult, EnginePort, FrameGroup
from lingbot_rt.session.session import Sampled, Session
from lingbot_rt.telemetry import Metrics
from lingbot_rt.transport.encode import EncodedBatch, FrameEncoder
from lingbot_rt.transport.outbox import HeadStart, Outbox, Pacer, Parcel, SendTimes

LEAD_CHUNKS = 2
"""Chunks planned and not wholly sent: the one in work and one on its way out."""

HEAD_START_CHUNKS = 2
"""How far keys may take a paced world ahead of its pace, in chunks: pressing and letting go are answered at once."""


@dataclass(eq=False)
class _Chunk:
    """One chunk on its way through."""

    sampled: Sampled
    num_batches: int
    stats: ChunkStats
    began_at: float  # when the generator turned to it
    opens: bool  # the first one, of the session or after a pause
    planned_at: float
    batches_packed: int = 0
    sent_at: float = 0.0
    first_group_s: float | None = None  # from the plan to its first pixels
    groups: list[npt.NDArray[np.uint8]] = field(default_factory=list)  # raw pixels, kept for the record only
    all_sent: asyncio.Event = field(default_factory=asyncio.Event)
    reported: asyncio.Event = field(default_factory=asyncio.Event)


class ChunkStream:
    """Runs one opened session until it is complete. Raises what the engine raised."""

    def __init__(
        self,
        session: Session,
        engine: EnginePort,
        outbox: Outbox,
        *,
        encoders: Executor,
        metrics: Metrics,
        recorder: SessionRecorder | None = None,
    ) -> None:
        settings = session.settings
        self._session = session
        self._engine = engine
        self._outbox = outbox
        self._encoders = encoders
        self._metrics = metrics
        self._recorder = recorder
        self._encoder = FrameEncoder(settings.output)
        self._pacer = Pacer(settings.playback_fps) if settings.pacing else None
        self._lead = asyncio.Semaphore(LEAD_CHUNKS)
        self._groups: asyncio.Queue[tuple[_Chunk, FrameGroup]] = asyncio.Queue(LEAD_CHUNKS * settings.latent_frames)
        self._results: asyncio.Queue[tuple[_Chunk, ChunkResult]] = asyncio.Queue(LEAD_CHUNKS)
        self._stirred = asyncio.Event()
        self._head_start = HeadStart(HEAD_START_CHUNKS * sum(session.group_sizes(1)) / settings.playback_fps)
        self._previous: _Chunk | None = None
        self._sent_before = 0.0  # when the chunk before was wholly sent
        self._first_group_s = 0.0
        self._ended = False

    async def run(self) -> None:
        """Returns after the last chunk of a session with ``max_chunks``, everything sent."""
        try:
            async with asyncio.TaskGroup() as tasks:
                encode = tasks.create_task(self._encode(), name="encode")
                report = tasks.create_task(self._report(), name="report")
                last = await self._generate()
                await last.reported.wait()
                encode.cancel()
                report.cancel()
        finally:
            self._ended = True

    def stir(self) -> None:
        """To be called after every event: a paused or a waiting generator looks again, and paced frames make way."""
        self._stirred.set()
        if self._pacer is not None:
            self._outbox.hurry()

    # --- plan and run ---

    async def _generate(self) -> _Chunk:
        """Chunk after chunk; returns the last one of a session with ``max_chunks``."""
        before: _Chunk | None = None
        while True:
            opens = before is None or self._session.is_paused
            while self._session.is_paused:
                self._stirred.clear()
                await self._stirred.wait()
            began_at = time.monotonic()
            await self._lead.acquire()
            room_at = time.monotonic()
            await self._just_in_time()
            if self._session.is_paused:  # it came while this chunk waited
                self._lead.release()
                continue
            chunk = self._plan(began_at, room_at, opens)
            if chunk.sampled.new_event:
                self._outbox.hurry()  # older frames, all of them there by now, make way for the ones that carry it
                if "control_ack" in self._session.settings.extensions:
                    plan = chunk.sampled.plan
                    await self._outbox.put(Parcel((control_ack_message(plan.event_id, "applied", plan.chunk_index),)))
            loop = asyncio.get_running_loop()

            def emit(group: FrameGroup, chunk: _Chunk = chunk, loop: asyncio.AbstractEventLoop = loop) -> None:
                if not self._ended:
                    loop.call_soon_threadsafe(self._take, chunk, group)

            try:
                result = await self._engine.run(chunk.sampled.plan, emit)
            except EngineFailed:
                await self._finish(before)
                raise
            before = chunk
            await self._results.put((chunk, result))
            if self._session.is_complete:
                return chunk

    async def _finish(self, before: _Chunk | None) -> None:
        """What was generated still goes out: all frames, and the statistics of the chunk ``before``."""
        await self._groups.join()
        if before is not None:
            await before.reported.wait()

    async def _just_in_time(self) -> None:
        """With pacing, a chunk started early would only wait to be sent: starting late samples fresher keys.

        An event ends the wait, since its frames are due at once, as far as the head start of the session goes.
        """
        if self._pacer is None:
            return
        await asyncio.sleep(0)  # groups that the engine's thread posted are taken first
        await self._groups.join()  # the pacer has counted every frame so far
        worth_starting_at = self._pacer.worth_starting_at(self._first_group_s)
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
            async with asyncio.timeout(worth_starting_at - time.monotonic()):
                await self._stirred.wait()
        except TimeoutError:
            return
        await asyncio.sleep(self._head_start.wait_s(worth_starting_at - time.monotonic()))
        self._head_start.spend(worth_starting_at - time.monotonic())

    def _plan(self, began_at: float, room_at: float, opens: bool) -> _Chunk:
        started_at = time.monotonic()
        self._stirred.clear()
        sampled = self._session.next_plan()
        planned_at = time.monotonic()
        plan = sampled.plan
        stats = ChunkStats(
            session_id=self._session.id,
            request_id=self._session.id,
            chunk_index=plan.chunk_index,
            event_id=plan.event_id,
            request_prepare_ms=1000 * (planned_at - started_at),
            queue_wait_ms=1000 * (room_at - began_at),
            pace_wait_ms=1000 * (started_at - room_at) if self._pacer else 0.0,
        )
        num_batches = self._session.num_batches(plan.chunk_index, self._session.settings.output.frames_per_batch)
        return _Chunk(sampled, num_batches, stats, began_at, opens, planned_at)

    def _take(self, chunk: _Chunk, group: FrameGroup) -> None:
        if not self._ended:
            self._groups.put_nowait((chunk, group))  # never full: the lead allows no more groups than it has room for

    # --- encode ---

    async def _encode(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            chunk, group = await self._groups.get()
            if chunk.first_group_s is None:
                chunk.first_group_s = self._first_group_s = time.monotonic() - chunk.planned_at
            if self._recorder is not None:
                chunk.groups.append(group.pixels)
            for pixels in self._encoder.split(group.pixels):
                started_at = time.monotonic()
                batch = await loop.run_in_executor(self._encoders, self._encoded, chunk, pixels)
                chunk.stats.raw_payload_build_ms += 1000 * (time.monotonic() - started_at)
                await self._send(chunk, batch)
            self._groups.task_done()

    def _encoded(self, chunk: _Chunk, pixels: npt.NDArray[np.uint8]) -> EncodedBatch:
        return self._encoder.encode(pixels, event_id=chunk.sampled.plan.event_id)

    async def _send(self, chunk: _Chunk, batch: EncodedBatch) -> None:
        if chunk.batches_packed == 0:
            # The stats of a chunk stand between its frames and the next one's.
            if self._previous is not None:
                await self._previous.reported.wait()
            self._previous = chunk
        plan, index = chunk.sampled.plan, chunk.batches_packed
        messages = batch_messages(
            batch,
            request_id=self._session.id,
            chunk_index=plan.chunk_index,
            frame_batch_index=index,
            num_frame_batches=chunk.num_batches,
            event_id=plan.event_id,
        )
        chunk.batches_packed += 1
        stats = chunk.stats
        stats.num_batches += 1
        stats.num_frames += batch.num_frames
        stats.raw_bytes += batch.raw_size
        stats.ws_payload_bytes += sum(len(message) for message in messages)
        stats.content_type = batch.content_type
        due = None if self._pacer is None else self._pacer.due(batch.num_frames, plan.event_id)
        await self._outbox.put(Parcel(messages, due, lambda times: self._sent(chunk, index, times)))

    def _sent(self, chunk: _Chunk, index: int, times: SendTimes) -> None:
        stats = chunk.stats
        stats.pace_wait_ms += times.pace_wait_ms
        stats.header_write_ms += times.header_write_ms
        stats.raw_write_ms += times.raw_write_ms
        chunk.sent_at = times.sent_at
        received_at = chunk.sampled.event_received_at
        if index == 0 and received_at is not None:
            stats.event_latency_ms = 1000 * (times.sent_at - received_at)
        if index == chunk.num_batches - 1:
            chunk.all_sent.set()

    # --- report ---

    async def _report(self) -> None:
        while True:
            chunk, result = await self._results.get()
            await chunk.all_sent.wait()
            stats, timings = chunk.stats, result.timings
            stats.scheduler_forward_ms = timings.total_ms
            stats.dit_ms, stats.vae_ms = timings.dit_ms, timings.vae_ms
            stats.window_frames = result.window_frames
            stats.postprocess_ms = timings.postprocess
            # Chunks overlap (the context pass runs after a chunk's frames are out): counted from the end of the one
            # before, the times of a session add up to its wall time.
            stats.chunk_total_ms = 1000 * (chunk.sent_at - (chunk.began_at if chunk.opens else self._sent_before))
            self._sent_before = chunk.sent_at
            if self._session.settings.profile:
                stats.stages = {"prepare": timings.prepare_ms, **timings.stages}
            for rank, ms in enumerate(timings.ranks_ms):
                self._metrics.rank_ms.labels(str(rank)).set(ms)
            self._record(chunk)
            is_sent = asyncio.Event()

            def sent(times: SendTimes, is_sent: asyncio.Event = is_sent) -> None:
                is_sent.set()

            await self._outbox.put(Parcel((stats_message(stats),), on_sent=sent))
            self._count(stats)
            if self._session.is_complete and stats.chunk_index == self._session.next_chunk - 1:
                await is_sent.wait()
            chunk.reported.set()
            self._lead.release()

    def _record(self, chunk: _Chunk) -> None:
        if self._recorder is None:
            return
        events = [RecordedEvent(event.kind, event.payload, event.event_id) for event in chunk.sampled.events]
        stats = chunk.stats
        self._recorder.chunk(stats.chunk_index, events, stats.event_id, chunk.groups, stats_fields(stats))

    def _count(self, stats: ChunkStats) -> None:
        metrics = self._metrics
        metrics.chunks.inc()
        metrics.frames.inc(stats.num_frames)
        metrics.sent_bytes.inc(stats.ws_payload_bytes)
        metrics.chunk_ms.observe(stats.chunk_total_ms)
        for stage, ms in (("dit", stats.dit_ms), ("vae", stats.vae_ms), ("encode", stats.raw_payload_build_ms)):
            metrics.stage_ms.labels(stage).observe(ms)
        if stats.event_latency_ms is not None:
            metrics.event_latency_ms.observe(stats.event_latency_ms)
