"""An engine without a model: known pixels, settable delays and failures, the real facade's threading."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lingbot_rt.engine.chunk_run import Emit, ThreadedChunkRun
from lingbot_rt.errors import CapacityError, ChunkCancelled, EngineFailed, InvalidEvent, InvalidInit, LingbotError
from lingbot_rt.session.plan import (
    ChunkPlan,
    ChunkResult,
    ChunkTimings,
    EngineStatus,
    FrameGroup,
    ModelInfo,
    Rewound,
    SessionPlan,
    WarmUp,
)
from lingbot_rt.session.world_file import FIRST_FRAME, FORMAT, read_world
from lingbot_rt.shapes import FrameSize, pixel_frames_of_latent

CARD = ModelInfo(
    model_id="fake-world",
    model_path="fake",
    default_size=FrameSize(64, 64),
    latent_frames=3,
    sink_frames=3,
    window_frames=9,
    num_steps=4,
    device="cpu",
    dtype="float32",
)


def frame(plan: SessionPlan, number: int) -> np.ndarray:
    """Pixel frame ``number`` of a session: the first frame, turned one column per frame."""
    return np.roll(plan.first_frame, number, axis=1)


def frames_before(plan: SessionPlan, chunk_index: int) -> int:
    """Pixel frames of the chunks before one."""
    return sum(pixel_frames_of_latent(index) for index in range(chunk_index * plan.latent_frames))


@dataclass
class FakeEngine:
    """``group_s`` is slept before each latent frame. Opening a session waits for ``may_open``."""

    group_s: float = 0.0
    close_s: float = 0.0
    fail_at_chunk: int | None = None
    start_error: LingbotError | None = None
    loading: EngineStatus | None = None  # stays in this status until ``finish_loading``
    max_open_pixels: int = 10**9
    profile_error: Exception | None = None
    warm_up: WarmUp | None = None  # of every session until one has opened
    plans: list[ChunkPlan] = field(default_factory=list)
    emitted_at: list[float] = field(default_factory=list)  # time.monotonic() of each latent frame's frames
    opening: list[SessionPlan] = field(default_factory=list)  # those that the thread has begun to open
    opened: list[SessionPlan] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    parked_bytes: int = 10**6  # of each parked session
    kept_chunks: int = 100  # newest chunks that a session can go back to
    snapshot_error: LingbotError | None = None
    snapshots: list[int] = field(default_factory=list)  # chunk index of each
    parked: list[str] = field(default_factory=list)
    rewinds: list[tuple[int, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_open = threading.Event()
        self.may_open.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fake-engine")
        self._sessions: dict[str, SessionPlan] = {}
        self._cancelled: dict[str, threading.Event] = {}
        self._next_chunk: dict[str, int] = {}
        self._branches: dict[str, list[int]] = {}  # where each branch of a session ends
        self._current: dict[str, int] = {}  # its current branch
        self._status = self.loading or EngineStatus()

    @property
    def live(self) -> int:
        return len(self._sessions)

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def model_info(self) -> ModelInfo:
        if not self._status.ready:
            raise EngineFailed("the model is not loaded yet")
        return CARD

    async def start(self) -> None:
        if self.start_error is not None:
            self._status = EngineStatus("failed", detail=str(self.start_error))
            raise self.start_error
        if self.loading is None:
            self.finish_loading()

    def finish_loading(self) -> None:
        self._status = EngineStatus("ready")

    async def stop(self) -> None:
        for session_id in list(self._sessions):
            await self.close(session_id)
        self._thread.shutdown(wait=True)

    @property
    def memory_bytes(self) -> dict[str, int]:
        return {"model": 3 * 10**9, "sessions": 10**9 * self.live, "pool": 10**8, "free": 4 * 10**9, "other": 0}

    @property
    def warm_sizes(self) -> tuple[FrameSize, ...] | None:
        return None if self.warm_up is None else (CARD.default_size,)

    def warm_up_of(self, plan: SessionPlan) -> WarmUp | None:
        return None if self.opened else self.warm_up

    async def open(self, plan: SessionPlan, world: bytes | None = None) -> Rewound | None:
        if plan.size.pixels > self.max_open_pixels:
            raise CapacityError(f"{plan.size} needs 9.0 GB, 1.0 GB is free: use a smaller size")
        self._cancelled[plan.session_id] = threading.Event()
        return await self._on_thread(self._open, plan, world)

    def _open(self, plan: SessionPlan, world: bytes | None) -> Rewound | None:
        self.opening.append(plan)
        assert self.may_open.wait(30)
        index = 0
        if world is not None:
            file = read_world(world)
            if file.world["model"] != {"name": CARD.model_id}:
                raise InvalidInit(f"it is of the model {file.world['model']}", field="resume")
            index = file.chunk_index
        self._sessions[plan.session_id] = plan
        self._next_chunk[plan.session_id], self._branches[plan.session_id] = index, [index]
        self._current[plan.session_id] = 0
        self.opened.append(plan)
        return None if world is None else Rewound(index, 0, exact=False)

    async def rewind(self, session_id: str, chunk_index: int, branch: int, keep: bool) -> Rewound:
        return await self._on_thread(self._rewind, session_id, chunk_index, branch, keep)

    def _rewind(self, session_id: str, chunk_index: int, branch: int, keep: bool) -> Rewound:
        branches, newest = self._branches[session_id], self._next_chunk[session_id]
        if not newest - self.kept_chunks <= chunk_index <= branches[branch]:
            raise InvalidEvent(f"{chunk_index}, kept of branch {branch} are others", field="chunk")
        self.rewinds.append((chunk_index, branch, keep))
        if keep:
            branches.append(chunk_index)
            branch = len(branches) - 1
        branches[branch] = self._next_chunk[session_id] = chunk_index
        self._current[session_id] = branch
        return Rewound(chunk_index, branch, exact=False)

    async def snapshot(self, session_id: str, about: str) -> bytes:
        return await self._on_thread(self._snapshot, session_id, about)

    def _snapshot(self, session_id: str, about: str) -> bytes:
        if self.snapshot_error is not None:
            raise self.snapshot_error
        plan, index = self._sessions[session_id], self._next_chunk[session_id]
        self.snapshots.append(index)
        world = {"chunk_index": index, "model": {"name": CARD.model_id}}
        metadata = {"format": FORMAT, "world": json.dumps(world), "about": about}
        return save({FIRST_FRAME: np.ascontiguousarray(plan.first_frame)}, metadata)

    async def park(self, session_id: str) -> int:
        self.parked.append(session_id)
        return self.parked_bytes

    def run(self, plan: ChunkPlan) -> ThreadedChunkRun:
        self.plans.append(plan)
        return ThreadedChunkRun(lambda emit: self._on_thread(self._run, plan, emit))

    def _run(self, plan: ChunkPlan, emit: Emit) -> ChunkResult:
        if plan.chunk_index == self.fail_at_chunk:
            raise EngineFailed("RuntimeError: out of fuel")
        session = self._sessions[plan.session_id]
        started, total = time.perf_counter(), 0
        assert plan.chunk_index == self._next_chunk[plan.session_id], "a chunk out of its order"
        before = frames_before(session, plan.chunk_index)
        for index in range(session.latent_frames):
            if self._cancelled[plan.session_id].wait(self.group_s):
                raise ChunkCancelled("the session closed")
            count = pixel_frames_of_latent(plan.chunk_index * session.latent_frames + index)
            pixels = np.stack([frame(session, before + total + i) for i in range(count)])
            total += count
            self.emitted_at.append(time.monotonic())
            emit(FrameGroup(plan.chunk_index, index, session.latent_frames, pixels))
        ms = 1000 * (time.perf_counter() - started)
        stages = {"denoise": ms * 0.6, "context": ms * 0.1}
        timings = ChunkTimings(0.1, ms * 0.7, ms * 0.3, ms, stages, ranks_ms=(ms,))
        self._next_chunk[plan.session_id] += 1
        branches, current = self._branches[plan.session_id], self._current[plan.session_id]
        branches[current] = self._next_chunk[plan.session_id]
        kept_from = max(branches[current] - self.kept_chunks, 0)
        return ChunkResult(plan.chunk_index, total, session.window_frames, timings, kept_from)

    def occupy(self, gate: threading.Event) -> None:
        """Keeps the engine's thread busy until ``gate`` is set, after what it has been told to do so far."""
        self._thread.submit(gate.wait, 30)

    async def profile(self, chunks: int, file: Path, limit_s: float) -> int:
        if self.profile_error is not None:
            raise self.profile_error
        begun = len(self.plans)
        while self.live and len(self.plans) < begun + chunks:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        recorded = min(len(self.plans) - begun, chunks)
        if recorded:
            await asyncio.to_thread(file.write_text, f"{recorded} chunks")
        return recorded

    async def close(self, session_id: str) -> None:
        if session_id in self._cancelled:
            self._cancelled[session_id].set()
        await self._on_thread(self._close, session_id)

    def _close(self, session_id: str) -> None:
        time.sleep(self.close_s)
        if self._sessions.pop(session_id, None) is not None:
            self.closed.append(session_id)

    async def _on_thread(self, job, *args):
        return await asyncio.get_running_loop().run_in_executor(self._thread, job, *args)
