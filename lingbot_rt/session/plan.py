"""What goes into the engine and what comes out: frozen, host data only, small enough to send to every rank.

Sizes: F latent frames per chunk, H x W pixels, n pixel frames.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lingbot_rt.shapes import FrameSize


@dataclass(frozen=True, slots=True)
class PostprocessPlan:
    """The same through a session; the defaults leave every frame as it is."""

    upscaling_scale: int = 1  # output side / decoded side, 1: off
    interpolation_exp: int = 0  # 2^exp times the frames, 0: off
    interpolation_scale: float = 1.0  # resolution at which motion is looked for, 1: the frames' own
    upscaling_model: Path | None = None  # None: the shipped network
    interpolation_model: Path | None = None
    upscaling_given: str = ""  # the model's path as the client wrote it, for errors
    interpolation_given: str = ""

    @property
    def upscales(self) -> bool:
        return self.upscaling_scale > 1

    @property
    def interpolates(self) -> bool:
        return self.interpolation_exp > 0

    @property
    def rate(self) -> int:
        """Frames out a frame in, also the factor on the frame rate."""
        return 2**self.interpolation_exp

    def frames_out(self, frames_in: int, *, first: bool) -> int:
        """Frames that ``frames_in`` decoded ones become; the session's very first frame has no predecessor."""
        return self.rate * frames_in - (self.rate - 1 if first and frames_in > 0 else 0)

    def size_out(self, size: FrameSize) -> FrameSize:
        """Size of the frames that leave, for decoded frames of ``size``."""
        return FrameSize(size.width * self.upscaling_scale, size.height * self.upscaling_scale)


UNCHANGED = PostprocessPlan()
"""Frames leave as they were decoded."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is, for /v1/models, the defaults of an init and its checks."""

    model_id: str  # the served name
    model_path: str  # what it was loaded from
    default_size: FrameSize
    latent_frames: int  # F the model is trained for
    sink_frames: int  # latent frames kept from the start of the session
    window_frames: int  # latent frames visible in all, sink and current chunk included
    num_steps: int  # distilled denoise steps
    device: str  # "cuda: NVIDIA H100", "cpu"
    dtype: str
    num_ranks: int = 1
    vae_parallel: str = "none"  # "width": all ranks decode
    attention_backend: str = "sdpa"  # the self-attention kernel in use
    kv_cache_dtype: str = "float32"  # of the attention window
    quantization: str = "none"
    vae_dtype: str = "float32"
    compiled: bool = False
    load_format: str = "auto"  # "dummy": the weights are random, and the frames are noise


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """Everything that stays the same through a session."""

    session_id: str
    prompt: str  # of chunk 0: encoded while the session opens
    first_frame: npt.NDArray[np.uint8]  # [H, W, 3], already at `size`
    size: FrameSize
    latent_frames: int  # F
    seed: int
    num_steps: int
    guidance_scale: float
    negative_prompt: str
    sink_frames: int
    window_frames: int
    postprocess: PostprocessPlan = UNCHANGED
    bfloat16_vae: bool = False  # also where the server's own VAE has another format
    recent_frames: tuple[int, ...] = ()  # what a chunk's `recent_frames` may be; empty: only None


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What has to happen before a session opens: code is compiled for its frame size and chunk length."""

    size: FrameSize
    latent_frames: int  # F
    expected_s: float | None  # what the newest one of another shape took; None before any


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The conditions of one chunk, sampled when its denoise starts."""

    session_id: str
    chunk_index: int
    prompt: str  # text K/V is rebuilt when it differs from the chunk before
    relative_poses: npt.NDArray[np.float64] | None  # [F, 4, 4] frame-to-frame, scaled; None: no camera control
    event_id: int | None  # newest sampled event, echoed in frame headers and stats
    intrinsics: npt.NDArray[np.float64] | None = None  # (fx, fy, cx, cy) [F, 4] in pixels; None: the model's own lens
    recent_frames: int | None = None  # latent frames before the chunk that it sees beside the sink; None: the window
    recache: bool = False  # the prompt is new, and the window's K/V are computed again for it


@dataclass(frozen=True, slots=True)
class FrameGroup:
    """The pixel frames of one latent frame, out as soon as they are decoded."""

    chunk_index: int
    group_index: int  # 0 .. F-1
    num_groups: int  # F
    pixels: npt.NDArray[np.uint8]  # [n, H, W, 3], n = 1 for the very first of a session, else 4, times 2^exp


@dataclass(frozen=True, slots=True)
class ChunkTimings:
    """Wall milliseconds of one chunk's stages on the engine."""

    prepare_ms: float  # prompt, ray map, condition
    dit_ms: float  # denoise forwards and context forward
    vae_ms: float  # decode, until the pixels are on the host
    total_ms: float  # from taking the plan to being ready for the next
    stages: dict[str, float] = field(default_factory=dict)  # every stage by name, for `profile`
    postprocess: dict[str, float] = field(default_factory=dict)  # upscale_ms, interpolate_ms, of what is on
    ranks_ms: tuple[float, ...] = ()  # newest chunk known of each rank, waits for the others left out


@dataclass(frozen=True, slots=True)
class ChunkResult:
    chunk_index: int
    num_frames: int  # pixel frames sent
    window_frames: int  # latent frames the last forward attended to
    timings: ChunkTimings
    kept_from: int | None = None  # the first chunk that the session can go back to; None: no history is kept


@dataclass(frozen=True, slots=True)
class Rewound:
    """Where a session stands after it went back, or was opened from a snapshot."""

    chunk_index: int  # the next chunk
    branch: int
    exact: bool  # False: its window was computed again without what had left it, so the world is alike, not the same
    kept_from: int = 0  # the first chunk that the session can go back to from there, in this branch


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Where the engine is between process start and ready; what /health says."""

    stage: str = "starting"  # "loading weights", "warming up", "ready", "failed", "stopped"
    progress: float | None = None  # 0..1 within the stage
    detail: str = ""

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    def __str__(self) -> str:
        percent = "" if self.progress is None else f" {round(100 * self.progress)} %"
        return f"{self.stage}{percent}{': ' + self.detail if self.detail else ''}"

    def as_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "progress": self.progress, "detail": self.detail}


class ChunkRun(Protocol):
    """One chunk in work. It runs from the start whether or not anybody iterates it."""

    def __aiter__(self) -> AsyncIterator[FrameGroup]:
        """The frames of each latent frame, in order, as soon as they are on the host.

        Raises what broke the chunk, after the frames that came before: ChunkCancelled, EngineFailed. Who iterates it
        again after its end sees the same end.
        """

    async def finished(self) -> float:
        """Returns once the engine is done with the chunk, however it ended: the time.monotonic() of that."""

    @property
    def result(self) -> ChunkResult:
        """Of a chunk that was iterated to its end."""


class EnginePort(Protocol):
    """What the server asks of an engine. ``engine/engine.py`` is the real one; tests bring one without torch."""

    @property
    def model_info(self) -> ModelInfo:
        """What the model is. Raises EngineFailed before it is loaded."""

    @property
    def status(self) -> EngineStatus: ...

    async def start(self) -> None:
        """Loads and warms up; returns when ready."""

    async def stop(self) -> None: ...

    @property
    def memory_bytes(self) -> Mapping[str, int]:
        """Bytes of the device by what holds them: model, sessions, pool, free, other; empty where it cannot tell."""

    @property
    def warm_sizes(self) -> tuple[FrameSize, ...] | None:
        """Sizes at which a session opens without a warm-up, with the model's latent frames; None: all of them."""

    def warm_up_of(self, plan: SessionPlan) -> WarmUp | None:
        """The warm-up that ``open`` begins with; None when the session's shape needs none."""

    async def open(self, plan: SessionPlan, world: bytes | None = None) -> Rewound | None:
        """Raises CapacityError or InvalidInit when the session cannot be opened.

        ``world``: a snapshot to go on from, whose place is returned. One of another model, or a damaged one, raises
        InvalidInit with the field "resume".
        """

    async def rewind(self, session_id: str, chunk_index: int, branch: int, keep: bool) -> Rewound:
        """Goes back to just before ``chunk_index`` of ``branch``; no chunk of the session may be running.

        With ``keep`` what came after stays as it is, and a new branch begins there; else it is forgotten.
        Raises InvalidEvent for a chunk that is not kept.
        """

    async def snapshot(self, session_id: str, about: str) -> bytes:
        """The session as a file, at the end of its newest chunk; ``world_file.read_world`` gives ``about`` again."""

    async def park(self, session_id: str) -> int:
        """No chunk comes for a while: the device's memory may be given to others. Returns the bytes that it holds."""

    def run(self, plan: ChunkPlan) -> ChunkRun:
        """Starts one chunk of an open session."""

    async def profile(self, chunks: int, file: Path, limit_s: float) -> int:
        """Writes a profiler trace of the next ``chunks`` chunks to ``file``. One call at a time.

        Returns how many came within ``limit_s``; without any, nothing is written. Raises OSError and EngineFailed.
        """

    async def close(self, session_id: str) -> None:
        """Interrupts the session's chunk and frees what it held. Idempotent."""
