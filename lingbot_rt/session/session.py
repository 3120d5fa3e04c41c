"""A session between its init and its last chunk, as a state machine: events in, plans and messages out.

It does no I/O and reads no clock: the caller gives every time, in seconds of one monotonic clock. ``next_chunk`` is the
one place where events are sampled, so calling it late samples fresh keys. Between two chunks ``state`` is all of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from lingbot_rt.errors import InvalidEvent, PauseExpired
from lingbot_rt.session.camera_path import CameraLens, CameraPath
from lingbot_rt.session.camera_poses import Notice, PosesEvent, require_steps
from lingbot_rt.session.controls import ConditionQueue, ControlEvent, PromptEvent, Received, parse_event, payload_of
from lingbot_rt.session.history import HISTORY_KINDS, Asked, Boundaries, Boundary, parse_asked
from lingbot_rt.session.interactive_window import InteractiveWindow
from lingbot_rt.session.messages import Event
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, Rewound
from lingbot_rt.session.server_messages import (
    AckState,
    ChunkStats,
    EncodedBatch,
    KeptChunks,
    batch_messages,
    control_ack_message,
    heartbeat_message,
    rewound_message,
    stats_message,
    warning_message,
    world_message,
)
from lingbot_rt.session.session_state import PathTable, SessionState, parsed
from lingbot_rt.session.settings import SessionSettings
from lingbot_rt.shapes import pixel_frames_of_latent

HEARTBEAT_S = 5.0

MAX_RECORDED_EVENTS = 4096
"""Events kept for the record until a chunk is planned."""


@dataclass(frozen=True, slots=True)
class SendTimes:
    """What it took to send one batch, in milliseconds."""

    header_write_ms: float  # the first message
    payload_write_ms: float  # the second one, when there is one
    sent_at: float  # the end, in seconds of the session's clock


@dataclass(eq=False, slots=True)
class Chunk:
    """One chunk between its plan and its statistics."""

    plan: ChunkPlan
    num_frames: int  # pixel frames it will send
    num_batches: int
    # Warnings, and a control_ack for each event that it is the first to sample or that no chunk will sample.
    acknowledgements: tuple[bytes, ...]
    newest_event: Received | None  # of those events
    events: tuple[tuple[str, Any, int | None], ...]  # kind, payload and id of what arrived before it, for the record
    begun_at: float
    is_opening: bool  # the first one, of the session, after a pause or after it went back
    stats: ChunkStats
    line: int  # how often the session had gone back before it
    sent_at: float = 0.0


@dataclass(slots=True)
class _Arrived:
    """An event for the record. What was parsed, not what was sent: a payload may hold megabytes that nobody reads."""

    parts: tuple[ControlEvent, ...]
    event_id: int | None


class Session:
    """What a session is. ``keep_events``: every chunk carries the events that arrived before it, for a record."""

    def __init__(
        self, session_id: str, settings: SessionSettings, *, opened_at: float = 0.0, keep_events: bool = False
    ) -> None:
        self.id = session_id
        self.settings = settings
        self.is_warming = False  # the engine compiles for its size before it opens
        self._queue = ConditionQueue(settings.prompt, settings.script)
        self._camera = CameraPath()
        self._lens = CameraLens(settings.size)
        self._window = InteractiveWindow(settings.recent_frames)
        self._prompt = settings.prompt  # of the newest chunk
        self._next_index = 0
        self._branch = 0
        self._boundaries = Boundaries()
        self._line = 0  # how often it went back
        self._asked: dict[str, Asked] = {}  # in the order in which they are to be done
        self._keep_events = keep_events
        self._arrived: deque[_Arrived] = deque(maxlen=MAX_RECORDED_EVENTS)
        self._arrived_path: _Arrived | None = None  # the entry whose path may still be sampled
        self._paused_at: float | None = None
        self._is_opening = True  # the next chunk is the first one, of the session or after a pause
        self._sent_at = -math.inf  # when the newest chunk was wholly sent
        self._opened_at = self._heartbeat_at = opened_at

    @classmethod
    def restored(cls, session_id: str, settings: SessionSettings, state: object, *, opened_at: float = 0.0) -> Session:
        """The session that ``state`` was taken of, with settings of the same init.

        Raises InvalidInit with the field ``resume`` when ``state`` is none.
        """
        it, found = cls(session_id, settings, opened_at=opened_at), parsed(state)
        paths = PathTable.of_payloads(found.paths)
        it._queue = ConditionQueue.restored(found.queue, paths, opened_at)
        it._camera = CameraPath.restored(found.camera, paths)
        it._lens = CameraLens.restored(settings.size, found.lens)
        it._window = InteractiveWindow(settings.recent_frames, found.still_chunks)
        it._prompt, it._next_index, it._branch = found.prompt, found.next_index, found.branch
        it._paused_at = opened_at if found.is_paused and "pause" in settings.extensions else None
        return it

    def state(self) -> Any:
        """Everything of the session, between two chunks, that does not follow from its settings, for JSON."""
        paths = PathTable()
        queue = self._queue.state(paths)
        camera = self._camera.state(paths)
        return msgspec.to_builtins(
            SessionState(
                next_index=self._next_index,
                branch=self._branch,
                prompt=self._prompt,
                is_paused=self.is_paused,
                still_chunks=self._window.still_chunks,
                lens=self._lens.state,
                camera=camera,
                queue=queue,
                paths=tuple(path.payload for path in paths.paths),
            )
        )

    def rejoin(self, settings: SessionSettings, place: Rewound, now: float) -> None:
        """A client goes on with the session, which stood still. ``settings``: how the session is sent from now on."""
        self.settings, self._branch = settings, place.branch
        self._heartbeat_at, self._is_opening = now, True
        if self._paused_at is not None:
            self._paused_at = now if "pause" in settings.extensions else None

    def forget_boundaries(self) -> None:
        """The session goes on from a snapshot, which has none of its branches."""
        self._boundaries = Boundaries()

    # --- what comes in ---

    @property
    def next_index(self) -> int:
        """The chunk that is planned next."""
        return self._next_index

    @property
    def branch(self) -> int:
        """The branch of the next chunk."""
        return self._branch

    @property
    def is_paused(self) -> bool:
        return self._paused_at is not None

    @property
    def is_complete(self) -> bool:
        """Whether ``max_chunks`` have been planned."""
        return self.settings.max_chunks is not None and self._next_index >= self.settings.max_chunks

    @property
    def usual_frames(self) -> int:
        """Pixel frames of any chunk but the first."""
        return sum(self._group_sizes(1))

    def receive(self, event: Event, now: float) -> tuple[bytes, ...]:
        """Applies one event whole and returns its acknowledgements, or raises InvalidEvent and changes nothing."""
        if event.kind in ("pause", "resume") and "pause" in self.settings.extensions:
            if event.kind == "resume":
                self._paused_at = None
            elif self._paused_at is None:
                self._paused_at, self._is_opening = now, True
            answers = self._acks([event], "dropped") if self.is_complete else self._applied([event], self._next_index)
        elif event.kind in HISTORY_KINDS and "history" in self.settings.extensions:
            answers = self._ask(event)
        else:
            parts = parse_event(event.kind, event.payload)
            for part in parts:
                if isinstance(part, PosesEvent) and part.anchor == "session":
                    require_steps(part.poses[:1], "camera_poses.poses", self._camera.previous)
            answers = self._apply(parts, event.event_id, now)
            if self.is_complete:
                answers += self._acks(self._queue.abandon(), "dropped")
        return self._acks([event], "received") + answers

    def tick(self, now: float) -> tuple[bytes, ...]:
        """What is due because of the time alone: heartbeats. Raises PauseExpired."""
        limit_s = self.settings.pause_limit_s
        if self._paused_at is not None and now - self._paused_at > limit_s:
            raise PauseExpired(f"the session was paused for longer than {limit_s:g} s (--pause-limit-s)")
        if "heartbeat" not in self.settings.extensions or now - self._heartbeat_at < HEARTBEAT_S:
            return ()
        self._heartbeat_at = now
        state = "paused" if self.is_paused else "running"
        if self.is_warming and "warming" in self.settings.extensions:
            state = "warming"
        return (heartbeat_message(1000 * (now - self._opened_at), state, self._next_index),)

    # --- between two chunks ---

    @property
    def has_asked(self) -> bool:
        return bool(self._asked)

    def take_asked(self) -> Asked | None:
        """What is to be done now that no chunk is in work; it counts as done."""
        return self._asked.pop(next(iter(self._asked))) if self._asked else None

    def require_kept(self, asked: Asked) -> None:
        """Raises InvalidEvent when the session cannot go back to where ``asked`` says."""
        if not self.settings.keeps_history:
            raise InvalidEvent("this server keeps no chunks to go back to (--history-mb 0)", field=asked.kind)
        if "history" not in self.settings.extensions:  # of a client that came back without it, before this was done
            raise InvalidEvent('needs "history" in protocol_extensions', field=asked.kind)
        if (asked.branch, asked.chunk) != (self._branch, self._next_index):
            self._boundaries.require(asked.branch, asked.chunk, self._branch)

    def gone_back(self, asked: Asked, place: Rewound) -> tuple[bytes, ...]:
        """The engine went back to where ``require_kept`` let it. Chunks that were planned before are not sent."""
        self._remember()
        boundary = self._boundaries.require(asked.branch, asked.chunk, self._branch)
        self._boundaries.go_back(asked.branch, asked.chunk, place.branch)
        self._boundaries.forget_before(place.branch, place.kept_from)
        self._branch, self._next_index = place.branch, place.chunk_index
        self._line += 1
        self._is_opening = True
        self._camera = CameraPath.restored(boundary.camera, PathTable())
        self._lens = CameraLens.restored(self.settings.size, boundary.lens)
        self._window = InteractiveWindow(self.settings.recent_frames, boundary.still_chunks)
        self._prompt = boundary.prompt
        dropped = self._queue.go_back(boundary.queued_prompt, boundary.prompt_event, place.chunk_index)
        self._keep_events = False  # a record has one line of chunks
        self._take_arrived()
        return (
            *self._acks(dropped, "dropped"),
            *self._applied([asked], place.chunk_index),
            rewound_message(place, asked.event_id),
        )

    def saved(self, asked: Asked, data: bytes) -> tuple[bytes, ...]:
        """The answer to ``save``. Raises InvalidEvent when ``data`` is too large for a message."""
        return (
            *self._applied([asked], self._next_index),
            world_message(data, self._next_index, asked.event_id),
        )

    def not_done(self, asked: Asked) -> tuple[bytes, ...]:
        """What was asked is refused after all; the error is sent beside it."""
        return self._acks([asked], "dropped")

    # --- what goes out, chunk by chunk ---

    def is_current(self, chunk: Chunk) -> bool:
        """False for a chunk of before the session went back."""
        return chunk.line == self._line

    def next_chunk(self, now: float) -> Chunk:
        """Samples what is in force now and moves the camera one chunk on."""
        self._remember()
        answers = () if self._next_index else self._warnings(self.settings.notices, None)
        for pinned in self.settings.pinned.get(self._next_index, ()):
            answers += self._apply(pinned.events, pinned.event_id, now)
        index, frames = self._next_index, self._group_sizes(self._next_index)
        conditions = self._queue.sample(self.settings.latent_frames)
        actions = conditions.camera_actions
        poses = None if actions is None else self._camera.extend(actions)
        recache = conditions.recache
        if recache is None:
            recache = self.settings.recache and conditions.prompt != self._prompt
        self._prompt = conditions.prompt
        plan = ChunkPlan(
            session_id=self.id,
            chunk_index=index,
            prompt=conditions.prompt,
            relative_poses=poses,
            event_id=conditions.event_id,
            intrinsics=None if actions is None else self._lens.extend(actions),
            recent_frames=self._window.next(poses),
            recache=recache,
        )
        max_batch = self.settings.output.frames_per_batch
        events = self._take_arrived()
        is_opening, self._is_opening = self._is_opening, self.is_paused
        self._next_index += 1
        if self.is_complete:
            answers += self._acks(self._queue.abandon(), "dropped")
        return Chunk(
            plan=plan,
            num_frames=sum(frames),
            num_batches=sum(-(-count // max_batch) for count in frames),
            acknowledgements=self._applied(conditions.sampled, index) + answers,
            newest_event=conditions.sampled[-1] if conditions.sampled else None,
            events=events,
            begun_at=now,
            is_opening=is_opening,
            stats=ChunkStats(self.id, self.id, index, event_id=conditions.event_id),
            line=self._line,
        )

    def again(self, chunk: Chunk, frames: Sequence[int], now: float) -> Chunk:
        """A chunk of which ``frames`` of each of its last latent frames are still to be sent, to a client that is back.

        Its acknowledgements have been sent.
        """
        max_batch = self.settings.output.frames_per_batch
        return replace(
            chunk,
            num_frames=sum(frames),
            num_batches=sum(-(-count // max_batch) for count in frames),
            acknowledgements=(),
            newest_event=None,
            begun_at=now,
            is_opening=True,
            stats=ChunkStats(self.id, self.id, chunk.plan.chunk_index, event_id=chunk.plan.event_id),
        )

    def frame_batch(self, chunk: Chunk, batch: EncodedBatch) -> tuple[bytes, ...]:
        """The wire messages of a chunk's next batch; they leave together."""
        stats = chunk.stats
        messages = batch_messages(
            batch,
            request_id=self.id,
            chunk_index=chunk.plan.chunk_index,
            frame_batch_index=stats.num_batches,
            num_frame_batches=chunk.num_batches,
            event_id=chunk.plan.event_id,
        )
        stats.num_batches += 1
        stats.num_frames += batch.num_frames
        stats.raw_bytes += batch.raw_size
        stats.ws_payload_bytes += sum(map(len, messages))
        stats.content_type = batch.content_type
        return messages

    def sent(self, chunk: Chunk, times: SendTimes, pace_wait_ms: float) -> None:
        """The batch that ``frame_batch`` gave last has left, after ``pace_wait_ms`` until it was due."""
        stats = chunk.stats
        stats.pace_wait_ms += pace_wait_ms
        stats.header_write_ms += times.header_write_ms
        stats.raw_write_ms += times.payload_write_ms
        if stats.num_batches == 1 and chunk.newest_event is not None:
            stats.event_latency_ms = 1000 * (times.sent_at - chunk.newest_event.at)
        chunk.sent_at = times.sent_at

    def stats(self, chunk: Chunk, result: ChunkResult) -> bytes:
        """The ``chunk_stats`` message of a chunk whose frames have all left."""
        stats, timings = chunk.stats, result.timings
        stats.scheduler_forward_ms = timings.total_ms
        stats.dit_ms, stats.vae_ms = timings.dit_ms, timings.vae_ms
        stats.window_frames = result.window_frames
        stats.postprocess_ms = timings.postprocess
        # Chunks overlap: the context pass runs after a chunk's frames are out. Counted from the end of the chunk
        # before, the times of a session add up to its wall time.
        since = max(chunk.begun_at, self._sent_at) if chunk.is_opening else self._sent_at
        stats.chunk_total_ms = 1000 * (chunk.sent_at - since)
        self._sent_at = chunk.sent_at
        if "history" in self.settings.extensions:
            stats.kept = KeptChunks(result.kept_from, self._branch)
            if result.kept_from is not None:
                self._boundaries.forget_before(self._branch, result.kept_from)
        if self.settings.profile:
            stats.stages = {"prepare": timings.prepare_ms, **timings.stages}
        return stats_message(stats)

    def _ask(self, event: Event) -> tuple[bytes, ...]:
        """Takes an event of the extension ``history``; a newer one replaces it until it is done."""
        try:
            asked = parse_asked(event.kind, event.payload, event.event_id, self._branch)
            if asked.kind != "save":
                self.require_kept(asked)
        except InvalidEvent as error:
            error.event_id = event.event_id
            raise
        if self.is_complete:
            return self._acks([asked], "dropped")
        what = "save" if asked.kind == "save" else "back"
        replaced = self._asked.pop(what, None)
        self._asked[what] = asked
        return () if replaced is None else self._acks([replaced], "dropped")

    def _remember(self) -> None:
        """What the session is before its next chunk, in case that it comes back."""
        if "history" not in self.settings.extensions or not self.settings.keeps_history:
            return
        prompt, prompt_event = self._queue.prompt_in_force
        boundary = Boundary(
            camera=self._camera.state(PathTable()),
            lens=self._lens.state,
            still_chunks=self._window.still_chunks,
            prompt=self._prompt,
            queued_prompt=prompt,
            prompt_event=prompt_event,
        )
        self._boundaries.remember(self._branch, self._next_index, boundary)

    def _apply(self, parts: tuple[ControlEvent, ...], event_id: int | None, now: float) -> tuple[bytes, ...]:
        """Takes one parsed event. Returns its warnings, and acknowledgements of older ones that no chunk samples."""
        dropped = self._queue.apply(parts, event_id, now)
        if self._keep_events:
            self._keep(_Arrived(parts, event_id))
        notices = [notice for part in parts if isinstance(part, PosesEvent) for notice in part.notices]
        return self._warnings(notices, event_id) + self._acks(dropped, "dropped")

    def _keep(self, arrived: _Arrived) -> None:
        """For the record. A path that was replaced before a chunk sampled it moved nothing, and is large."""
        if self._arrived_path is not None and any(not isinstance(part, PromptEvent) for part in arrived.parts):
            replaced = self._arrived_path
            replaced.parts = tuple(part for part in replaced.parts if not isinstance(part, PosesEvent))
            self._arrived_path = None
        if any(isinstance(part, PosesEvent) for part in arrived.parts):
            self._arrived_path = arrived
        self._arrived.append(arrived)

    def _take_arrived(self) -> tuple[tuple[str, Any, int | None], ...]:
        arrived = [(*payload_of(each.parts), each.event_id) for each in self._arrived if each.parts]
        self._arrived.clear()
        self._arrived_path = None
        return tuple(arrived)

    def _warnings(self, notices: Iterable[Notice], event_id: int | None) -> tuple[bytes, ...]:
        if "warning" not in self.settings.extensions:
            return ()
        return tuple(warning_message(notice.text, notice.field, event_id) for notice in notices)

    def _applied(self, events: Iterable[Event | Received | Asked], chunk_index: int) -> tuple[bytes, ...]:
        return self._acks(events, "applied", chunk_index)

    def _acks(
        self, events: Iterable[Event | Received | Asked], state: AckState, chunk_index: int | None = None
    ) -> tuple[bytes, ...]:
        if "control_ack" not in self.settings.extensions:
            return ()
        return tuple(control_ack_message(event.event_id, state, chunk_index) for event in events)

    def _group_sizes(self, chunk_index: int) -> list[int]:
        """Pixel frames that leave for each latent frame of a chunk, known before any is decoded."""
        first, post = chunk_index * self.settings.latent_frames, self.settings.postprocess
        decoded = [pixel_frames_of_latent(first + i) for i in range(self.settings.latent_frames)]
        return [post.frames_out(frames, first=first + i == 0) for i, frames in enumerate(decoded)]
