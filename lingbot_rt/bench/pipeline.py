"""Runs chunks of a synthetic session through the engine's own ``run_chunk`` and collects its timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.compilation import tuned_convolutions
from lingbot_rt.engine.memory import GB, require_room
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import ConfigError
from lingbot_rt.parallel.coordinator import Close, Coordinator, SingleCoordinator
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, FrameGroup, SessionPlan
from lingbot_rt.shapes import FrameSize

MIN_WARM_CHUNKS = 6
OPENING_CHUNKS = 4
"""The case ``sglang-ci`` measures chunks 0 to 3 of each session, while the window still grows."""

_COMPILING_S = 300
"""How long a rank may take in a chunk before it counts as lost: in the warm-up it compiles."""

_KEYS = (("w",), ("w", "l"))


@dataclass(frozen=True, slots=True)
class Workload:
    """What to run and measure. None means the model's own value; for ``warm``, as many chunks as fill the window."""

    size: FrameSize | None = None
    sink_frames: int | None = None
    window_frames: int | None = None
    num_steps: int | None = None
    chunks: int = 20
    warm: int | None = None
    opening: bool = False  # measure chunks 0 to 3 of several sessions instead of one session's steady chunks

    def session_plan(self, pipeline: Pipeline) -> SessionPlan:
        """Raises ConfigError for an impossible window or size."""
        model_info = pipeline.model_info
        size = self.size or model_info.default_size
        plan = SessionPlan(
            session_id="bench",
            prompt="a quiet street",
            first_frame=np.full((size.height, size.width, 3), 127, np.uint8),
            size=size,
            latent_frames=model_info.latent_frames,
            seed=0,
            num_steps=self.num_steps or model_info.num_steps,
            guidance_scale=1.0,
            negative_prompt="",
            sink_frames=model_info.sink_frames if self.sink_frames is None else self.sink_frames,
            window_frames=self.window_frames or model_info.window_frames,
        )
        if not size.is_whole_tokens:
            raise ConfigError(f"--size {size}: both sides must be multiples of 16", field="size")
        if plan.window_frames < plan.sink_frames + plan.latent_frames:
            raise ConfigError(
                f"--window {plan.window_frames} is too small for a sink of {plan.sink_frames} and a chunk of "
                f"{plan.latent_frames} latent frames",
                field="window",
            )
        return plan

    def warm_chunks(self, plan: SessionPlan) -> int:
        """Chunks that run before the first measured one: at least 6 unless ``warm`` says otherwise.

        The last one's window is full for the second time: its context pass is captured as a CUDA graph then.
        """
        if self.opening:
            return OPENING_CHUNKS
        filling = -(-plan.window_frames // plan.latent_frames)
        return max(filling + 1, MIN_WARM_CHUNKS) if self.warm is None else self.warm

    def measured_chunks(self) -> int:
        """Chunks to measure; with ``opening`` rounded down to whole sessions of four, at least one."""
        return max(self.chunks // OPENING_CHUNKS, 1) * OPENING_CHUNKS if self.opening else self.chunks


@dataclass(frozen=True, slots=True)
class TimedChunk:
    result: ChunkResult
    first_frames_ms: float  # from the chunk's start until its first frames are on the host
    exchange_ms: float | None  # waits for other ranks, and transfers outside of kernels; None with one rank

    def stages(self) -> dict[str, float]:
        """Milliseconds by reported name, in report order.

        ``prepare`` includes ``camera``. ``DiT`` is ``denoise`` + ``context``. ``first frames`` counts from the chunk's
        start; ``after denoise`` is the part of it after the last denoise step. ``exchange`` is included in the others.
        """
        timings = self.result.timings
        exchange = {} if self.exchange_ms is None else {"exchange": self.exchange_ms}
        return exchange | {
            "prepare": timings.prepare_ms,
            "camera": timings.stages["camera"],
            "denoise": timings.stages["denoise"],
            "context": timings.stages["context"],
            "DiT": timings.dit_ms,
            "VAE": timings.vae_ms,
            "first frames": self.first_frames_ms,
            "after denoise": self.first_frames_ms - timings.prepare_ms - timings.stages["denoise"],
            "total": timings.total_ms,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """Everything measured under ``workload``."""

    workload: Workload
    plan: SessionPlan
    chunks: list[TimedChunk]
    planned_memory_gb: float  # the server's estimate for this session, without the weights
    peak_memory_gb: float | None  # peak of all tensors, weights included; None on a CPU

    @property
    def visible_frames(self) -> list[int]:
        """Latent frames that each measured chunk attended to."""
        return [chunk.result.window_frames for chunk in self.chunks]


class SyntheticSession:
    """A session without a client: holds W and turns in every second chunk. ``coordinator`` tells the other ranks."""

    def __init__(self, pipeline: Pipeline, plan: SessionPlan, coordinator: Coordinator | None = None) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._coordinator = coordinator or SingleCoordinator()
        with self._coordinator.command(plan):
            self._session = SessionState(pipeline, plan)
        self._camera = CameraPath()
        self._next = 0

    def jump(self, chunk_index: int) -> None:
        """Makes ``chunk_index`` the next chunk, as if all chunks before it had run. The window keeps its content."""
        self._next = chunk_index

    def step(self, recent_frames: int | None = None) -> TimedChunk:
        """Runs the next chunk, which sees so many latent frames before it; None: the whole window."""
        keys = _KEYS[self._next % len(_KEYS)]
        poses = self._camera.extend((keys,) * self._plan.latent_frames)
        plan = ChunkPlan(self._plan.session_id, self._next, self._plan.prompt, poses, None, recent_frames=recent_frames)
        first_at: list[float] = []

        def emit(group: FrameGroup) -> None:
            if not first_at:
                first_at.append(time.perf_counter())

        started = time.perf_counter()
        with self._coordinator.command(plan, _COMPILING_S):
            result = run_chunk(self._pipeline, self._session, plan, emit)
        self._next += 1
        ranks = self._pipeline.ranks
        exchange_ms = None if ranks.world == 1 else result.timings.total_ms - ranks.heartbeat.compute_ms
        return TimedChunk(result, 1000 * (first_at[0] - started), exchange_ms)

    def close(self) -> None:
        """Frees the session's memory on the other ranks."""
        with self._coordinator.command(Close(self._plan.session_id)):
            pass


def run_chunks(
    pipeline: Pipeline, workload: Workload, on_chunk: Callable[[], object], coordinator: Coordinator | None = None
) -> Run:
    """Warms up, then measures. Calls ``on_chunk`` after every chunk, warm-up included.

    Raises ConfigError for an impossible workload, CapacityError if its session does not fit in memory.
    """
    plan = workload.session_plan(pipeline)
    planned = require_room(pipeline, plan, coordinator)
    warm, measured = workload.warm_chunks(plan), workload.measured_chunks()
    session_length = OPENING_CHUNKS if workload.opening else warm + measured
    chunks = _chunks(pipeline, plan, session_length, coordinator)
    with tuned_convolutions():  # as in the server's warm-up
        for _ in range(warm):
            next(chunks)
            on_chunk()
    reset_peak_memory(pipeline.device)
    timed = []
    for _ in range(measured):
        timed.append(next(chunks))
        on_chunk()
    return Run(workload, plan, timed, planned.total_bytes / GB, peak_memory_gb(pipeline.device))


def reset_peak_memory(device: torch.device) -> None:
    """Restarts the measurement that ``peak_memory_gb`` reads."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory of all tensors since ``reset_peak_memory``, in units of 1e9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None


def profile_chunk(pipeline: Pipeline, workload: Workload, path: str, coordinator: Coordinator | None = None) -> None:
    """Writes a Chrome trace (chrome://tracing, Perfetto) of one chunk to the file ``path``, after the same warm-up.

    The trace shows this process only, not the other ranks.
    """
    plan = workload.session_plan(pipeline)
    session = SyntheticSession(pipeline, plan, coordinator)
    with tuned_convolutions():
        for _ in range(workload.warm_chunks(plan)):
            session.step()
    activities = [ProfilerActivity.CPU]
    if pipeline.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        session.step()
    profiler.export_chrome_trace(path)


def _chunks(
    pipeline: Pipeline, plan: SessionPlan, session_length: int, coordinator: Coordinator | None
) -> Iterator[TimedChunk]:
    """Endless chunks: sessions of ``session_length`` chunks one after the other, since two windows may not fit."""
    while True:
        yield from _session(pipeline, plan, session_length, coordinator)


def _session(
    pipeline: Pipeline, plan: SessionPlan, length: int, coordinator: Coordinator | None
) -> Iterator[TimedChunk]:
    session = SyntheticSession(pipeline, plan, coordinator)
    for _ in range(length):
        yield session.step()
    session.close()
