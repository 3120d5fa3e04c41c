"""Steady chunks through the engine's own ``run_chunk``, timed by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.memory import GB, require_room
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import ConfigError
from lingbot_rt.parallel.coordinator import Close, Coordinator, SingleCoordinator
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, FrameGroup, SessionPlan
from lingbot_rt.shapes import FrameSize

LEAST_WARM = 6
OPENING_CHUNKS = 4
"""Chunks of a session that the case ``sglang-ci`` takes the mean of: 0 to 3, the window still growing."""

_KEYS = (("w",), ("w", "l"))


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the pipeline. None: the model's own, and for ``warm`` what fills the window, at least 6."""

    size: FrameSize | None = None
    sink_frames: int | None = None
    window_frames: int | None = None
    num_steps: int | None = None
    chunks: int = 20
    warm: int | None = None
    opening: bool = False  # chunks 0..3 of several sessions in place of one session's steady ones

    def session_plan(self, pipeline: Pipeline) -> SessionPlan:
        """Raises ConfigError for a window or a size that cannot be."""
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
                f"--window {plan.window_frames} must hold the sink of {plan.sink_frames} and a chunk of "
                f"{plan.latent_frames}",
                field="window",
            )
        return plan

    def warm_chunks(self, plan: SessionPlan) -> int:
        """Chunks run before any is measured."""
        if self.opening:
            return OPENING_CHUNKS
        return max(-(-plan.window_frames // plan.latent_frames), LEAST_WARM) if self.warm is None else self.warm

    def measured_chunks(self) -> int:
        """Chunks measured: whole openings where those are asked for."""
        return max(self.chunks // OPENING_CHUNKS, 1) * OPENING_CHUNKS if self.opening else self.chunks


@dataclass(frozen=True, slots=True)
class TimedChunk:
    result: ChunkResult
    first_frames_ms: float  # from the chunk's begin until the host has its first frames
    exchange_ms: float | None  # in exchanges with other ranks, waits for them included; None where there are none

    def stages(self) -> dict[str, float]:
        """Milliseconds by the names that are reported, in their order.

        ``prepare`` has ``camera`` in it, ``DiT`` is ``denoise`` and ``context``; ``first frames`` is counted from the
        chunk's begin, ``after denoise`` is its part after the last denoise step. ``exchange`` is a part of all others.
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
    """What was measured of a pipeline under ``load``."""

    load: Load
    plan: SessionPlan
    chunks: list[TimedChunk]
    planned_memory_gb: float  # what the server would count for this session, the weights left out
    peak_memory_gb: float | None  # what was taken in all; None on a CPU

    @property
    def visible_frames(self) -> list[int]:
        """Latent frames that each chunk attended to."""
        return [chunk.result.window_frames for chunk in self.chunks]


class Walk:
    """A session driven by hand, W held all the way and a turn now and then. ``leader`` hands it on to other ranks."""

    def __init__(self, pipeline: Pipeline, plan: SessionPlan, leader: Coordinator | None = None) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._leader = leader or SingleCoordinator()
        with self._leader.command(plan):
            self._session = SessionState(pipeline, plan)
        self._camera = CameraPath()
        self._next = 0

    def jump(self, chunk_index: int) -> None:
        """The next chunk is this one, as if all before it had been run; the window keeps what is in it."""
        self._next = chunk_index

    def step(self) -> TimedChunk:
        keys = _KEYS[self._next % len(_KEYS)]
        poses = self._camera.extend((keys,) * self._plan.latent_frames)
        plan = ChunkPlan(self._plan.session_id, self._next, self._plan.prompt, poses, None)
        first_at: list[float] = []

        def emit(group: FrameGroup) -> None:
            if not first_at:
                first_at.append(time.perf_counter())

        begun = time.perf_counter()
        with self._leader.command(plan):
            result = run_chunk(self._pipeline, self._session, plan, emit)
        self._next += 1
        ranks = self._pipeline.ranks
        exchange_ms = None if ranks.world == 1 else result.timings.total_ms - ranks.heartbeat.compute_ms
        return TimedChunk(result, 1000 * (first_at[0] - begun), exchange_ms)

    def end(self) -> None:
        """Frees what the session holds on the other ranks."""
        with self._leader.command(Close(self._plan.session_id)):
            pass


def run_chunks(pipeline: Pipeline, load: Load, done: Callable[[], object], leader: Coordinator | None = None) -> Run:
    """Warms up, then measures; ``done`` is called after every chunk, warm ones too. ``leader``: of several ranks.

    Raises ConfigError for a load that cannot be, CapacityError when its session would not fit.
    """
    plan = load.session_plan(pipeline)
    planned = require_room(pipeline, plan)
    warm, measured = load.warm_chunks(plan), load.measured_chunks()
    session_length = OPENING_CHUNKS if load.opening else warm + measured
    chunks = _chunks(pipeline, plan, session_length, leader)
    for _ in range(warm):
        next(chunks)
        done()
    reset_peak_memory(pipeline.device)
    timed = []
    for _ in range(measured):
        timed.append(next(chunks))
        done()
    return Run(load, plan, timed, planned.total_bytes / GB, peak_memory_gb(pipeline.device))


def reset_peak_memory(device: torch.device) -> None:
    """From here on ``peak_memory_gb`` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float | None:
    """The most that tensors took since ``reset_peak_memory``, in units of 1e9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None


def profile_chunk(pipeline: Pipeline, load: Load, path: str, leader: Coordinator | None = None) -> None:
    """A Chrome trace (chrome://tracing, Perfetto) of one chunk, as warm as the measured ones, in the file ``path``: of
    this process, where there are others."""
    plan = load.session_plan(pipeline)
    walk = Walk(pipeline, plan, leader)
    for _ in range(load.warm_chunks(plan)):
        walk.step()
    activities = [ProfilerActivity.CPU]
    if pipeline.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        walk.step()
    profiler.export_chrome_trace(path)


def _chunks(
    pipeline: Pipeline, plan: SessionPlan, session_length: int, leader: Coordinator | None
) -> Iterator[TimedChunk]:
    """Sessions of so many chunks without end, one after the other: at full size the windows of two would not fit."""
    while True:
        yield from _session(pipeline, plan, session_length, leader)


def _session(pipeline: Pipeline, plan: SessionPlan, length: int, leader: Coordinator | None) -> Iterator[TimedChunk]:
    walk = Walk(pipeline, plan, leader)
    for _ in range(length):
        yield walk.step()
    walk.end()
