"""One session without any I/O: events go in, the next chunk's plan comes out. Times are given, never read.

``next_plan`` is the one place where events are sampled, as late as its caller can call it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.controls import ConditionQueue, parse_event
from lingbot_rt.session.messages import Event
from lingbot_rt.session.plan import ChunkPlan
from lingbot_rt.session.settings import SessionSettings
from lingbot_rt.shapes import pixel_frames_of_latent

MAX_REMEMBERED_EVENTS = 512
"""Arrival times kept for events that no chunk has sampled yet."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A plan and what its stats need to know about the event it carries."""

    plan: ChunkPlan
    new_event: bool  # the plan's event_id is in force from this chunk on
    event_received_at: float | None  # seconds on the caller's clock; None: no new event
    events: tuple[Event, ...] = ()  # what this plan was the first to sample, for the record


class Session:
    """What a session is between its init and its last chunk."""

    def __init__(self, session_id: str, settings: SessionSettings) -> None:
        self.id = session_id
        self.settings = settings
        self._queue = ConditionQueue(settings.prompt, settings.script)
        self._camera = CameraPath()
        self._next_chunk = 0
        self._event_id: int | None = None
        self._received_at: OrderedDict[int, float] = OrderedDict()
        self._arrived: deque[Event] = deque(maxlen=MAX_REMEMBERED_EVENTS)
        self._paused = False

    @property
    def next_chunk(self) -> int:
        """Index of the chunk that ``next_plan`` would give."""
        return self._next_chunk

    @property
    def is_paused(self) -> bool:
        return self._paused

    @property
    def is_complete(self) -> bool:
        """Whether ``max_chunks`` have been planned."""
        return self.settings.max_chunks is not None and self._next_chunk >= self.settings.max_chunks

    def receive(self, event: Event, now: float) -> None:
        """Applies one event whole, or raises InvalidEvent and changes nothing."""
        if "pause" in self.settings.extensions and event.kind in ("pause", "resume"):
            self._paused = event.kind == "pause"
            return
        self._apply(event)
        if event.event_id is not None:
            self._received_at[event.event_id] = now
            if len(self._received_at) > MAX_REMEMBERED_EVENTS:
                self._received_at.popitem(last=False)

    def next_plan(self) -> Sampled:
        """Samples what is in force now and walks the camera one chunk on."""
        for event in self.settings.pinned.get(self._next_chunk, ()):
            self._apply(event)
        conditions = self._queue.sample(self.settings.latent_frames)
        actions = conditions.camera_actions
        plan = ChunkPlan(
            session_id=self.id,
            chunk_index=self._next_chunk,
            prompt=conditions.prompt,
            relative_poses=None if actions is None else self._camera.extend(actions),
            event_id=conditions.event_id,
        )
        self._next_chunk += 1
        return self._sampled(plan)

    def _apply(self, event: Event) -> None:
        self._queue.apply(parse_event(event.kind, event.payload), event.event_id)
        self._arrived.append(event)

    def _sampled(self, plan: ChunkPlan) -> Sampled:
        events = tuple(self._arrived)
        self._arrived.clear()
        if plan.event_id is None or plan.event_id == self._event_id:
            return Sampled(plan, new_event=False, event_received_at=None, events=events)
        self._event_id = plan.event_id
        received_at = self._received_at.pop(plan.event_id, None)
        return Sampled(plan, new_event=True, event_received_at=received_at, events=events)

    def group_sizes(self, chunk_index: int) -> list[int]:
        """Pixel frames that leave for each latent frame of a chunk, known before any is decoded."""
        first = chunk_index * self.settings.latent_frames
        decoded = [pixel_frames_of_latent(first + i) for i in range(self.settings.latent_frames)]
        opens = chunk_index == 0
        post = self.settings.postprocess
        return [post.frames_out(frames, first=opens and i == 0) for i, frames in enumerate(decoded)]

    def num_batches(self, chunk_index: int, max_batch: int) -> int:
        """Frame batches of a chunk: every latent frame's pixels leave on their own, at most ``max_batch`` together."""
        return sum(-(-frames // max_batch) for frames in self.group_sizes(chunk_index))
