"""A session that is open on the engine, whoever watches it, and the frames that its client may not have."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidInit
from lingbot_rt.recording.session_record import SessionRecorder
from lingbot_rt.session.controls import payload_of
from lingbot_rt.session.messages import Init, PinnedEvent
from lingbot_rt.session.plan import ChunkRun, ModelInfo
from lingbot_rt.session.session import Chunk, Session
from lingbot_rt.session.settings import SessionSettings, resolve
from lingbot_rt.session.world_file import WorldFile
from lingbot_rt.telemetry.session import SessionTelemetry

Pixels = npt.NDArray[np.uint8]

KEPT_CHUNKS = 2
"""Newest chunks whose frames are kept until it is sure that the client has them."""

MAX_KEPT_FRAME_BYTES = 256 * 2**20
"""Largest size of these frames; of larger ones only what is being sent is kept."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a client that is back says it has."""

    chunk: int
    frames: int | None  # of that chunk; None: all


@dataclass(eq=False, slots=True)
class NewChunk:
    """One of the newest chunks: its frames, as far as they are out of the engine."""

    chunk: Chunk
    run: ChunkRun
    groups: list[Pixels] = field(default_factory=list)  # [n, H, W, 3] of each latent frame
    has_begun: bool = False  # its first frames are out
    is_out: bool = False  # all of them are
    num_sent: int = 0  # frames that have left
    is_told: bool = False  # its statistics have left

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    async def settle(self) -> None:
        """Returns when the engine is done with it and its frames are here. Raises what broke it."""
        if not self.is_out:
            async for group in self.run:
                self.groups.append(group.pixels)
            self.is_out = True
        await self.run.finished()

    def left(self, received: Received | None) -> list[Pixels]:
        """The frames that a client has not got: that were not sent, or that are not among ``received``."""
        skipped = self.num_sent
        if received is not None:
            index = self.chunk.plan.chunk_index
            skipped = 0 if index > received.chunk else self.chunk.num_frames
            if index == received.chunk and received.frames is not None:
                skipped = received.frames
        return list(_without(self.groups, skipped))


def _without(groups: list[Pixels], skipped: int) -> Iterator[Pixels]:
    for group in groups:
        if skipped < len(group):
            yield group[skipped:]
        skipped = max(skipped - len(group), 0)


@dataclass(eq=False)
class LiveSession:
    """Everything of a session that outlives its connection."""

    session: Session
    init: Init  # without its first frame
    telemetry: SessionTelemetry
    recorder: SessionRecorder | None = None
    is_kept: bool = False  # its client may come back for frames that it has not got
    newest: deque[NewChunk] = field(default_factory=lambda: deque(maxlen=KEPT_CHUNKS))

    @property
    def id(self) -> str:
        return self.session.id

    def begin(self, chunk: Chunk, run: ChunkRun) -> NewChunk:
        """A chunk has begun on the engine."""
        while self.newest and self.frame_bytes > MAX_KEPT_FRAME_BYTES:
            self.newest.popleft()
        self.newest.append(NewChunk(chunk, run))
        return self.newest[-1]

    @property
    def frame_bytes(self) -> int:
        return sum(new.nbytes for new in self.newest)

    async def settle(self) -> None:
        """Returns once no chunk is in work and its frames are here. Raises what broke it."""
        for new in self.newest:
            await new.settle()

    def to_resend(self, received: Received | None) -> list[tuple[NewChunk, list[Pixels]]]:
        """The newest chunks of which something is still to be sent, and their frames; of some only the statistics."""
        wanted = [(new, new.left(received)) for new in self.newest]
        return [(new, frames) for new, frames in wanted if frames or not new.is_told]

    def about(self) -> str:
        """``about`` of this session."""
        return about(self.session, self.init)

    async def over(self, reason: str) -> None:
        """Nobody comes back for its frames. Idempotent."""
        self.newest.clear()
        await self.end_record(reason)

    async def end_record(self, reason: str) -> None:
        """Idempotent."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            await asyncio.to_thread(recorder.close, reason)


def about(session: Session, init: Init) -> str:
    """The server's part of a snapshot: the session of ``init`` as it stands between two chunks."""
    plain = _plain(init, session.settings)
    return json.dumps({"session_id": session.id, "init": plain, "control": session.state()})


def _plain(init: Init, settings: SessionSettings) -> dict[str, Any]:
    """The init that gives ``settings`` again on any server of the model, with what JSON can hold."""
    pinned = tuple(
        PinnedEvent(chunk=chunk, kind=kind, payload=payload, event_id=event.event_id)
        for chunk, events in settings.pinned.items()
        for event in events
        for kind, payload in [payload_of(event.events)]
    )
    plain = msgspec.structs.replace(
        init,
        first_frame="",
        model="",  # the engine compares what the model is, not what it is called
        num_inference_steps=settings.num_steps,
        realtime_causal_sink_size=settings.sink_frames,
        realtime_causal_kv_cache_num_frames=settings.window_frames,
        interactive_kv_window=bool(settings.recent_frames),
        realtime_output_format=settings.output.name,
        output_compression=settings.output.quality,
        realtime_preview_max_width=settings.output.preview_max_width,
        realtime_output_pacing=settings.pacing,
        max_chunks=settings.max_chunks,
        profile=settings.profile,
        condition_inputs=None,  # its script is in the state of the controls
        protocol_extensions=tuple(sorted(settings.extensions | ({"pinned_events"} if pinned else set()))),
        pinned_events=pinned,
        record=False,
    )
    fields: dict[str, Any] = msgspec.to_builtins(plain)
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What the server wrote into a snapshot, read and checked."""

    session_id: str  # of the session that was written
    init: Init  # without its first frame
    settings: SessionSettings
    control: Any  # ``Session.restored`` takes it
    first_frame: Pixels

    @classmethod
    def of(cls, file: WorldFile, info: ModelInfo, config: ServeConfig) -> SavedSession:
        """Raises InvalidInit with the field ``resume`` when the session cannot go on here."""
        try:
            about = msgspec.json.decode(file.about, type=_About)
            init = msgspec.convert(about.init | {"type": "init"}, Init)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidInit(f"the snapshot is damaged: {str(error)[:200]}", field="resume") from None
        try:
            settings = resolve(init, info, config)
        except InvalidInit as error:
            raise InvalidInit(f"the saved session cannot go on here: {error.field}: {error}", field="resume") from None
        shape = (settings.size.height, settings.size.width)
        if file.first_frame.shape[:2] != shape:
            height, width, _ = file.first_frame.shape
            raise InvalidInit(
                f"the snapshot is damaged: its first frame is {width}x{height}, expected {settings.size}",
                field="resume",
            )
        control = about.control
        if control.get("next_index") != file.chunk_index:
            raise InvalidInit("the snapshot is damaged: its parts are of different chunks", field="resume")
        return cls(about.session_id, init, settings, control, file.first_frame)


class _About(msgspec.Struct):
    session_id: str
    init: dict[str, Any]
    control: dict[str, Any]
