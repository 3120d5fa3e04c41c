"""What goes into the engine and what comes out: frozen, host data only, small enough to send to every rank.

The legend of sizes: F latent frames a chunk, H x W pixels, n pixel frames. This module never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lingbot_rt.postprocess.plan import PostprocessPlan
from lingbot_rt.shapes import FrameSize

UNCHANGED = PostprocessPlan()
"""Frames leave as they were decoded."""


@dataclass(frozen=True, slots=True)
class ModelCard:
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
    attention_backend: str = "sdpa"  # the self-attention kernel in use
    quantization: str = "none"
    vae_dtype: str = "float32"
    compiled: bool = False


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


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The conditions of one chunk, sampled when its denoise starts."""

    session_id: str
    chunk_index: int
    prompt: str  # text K/V is rebuilt when it differs from the chunk before
    relative_poses: npt.NDArray[np.float64] | None  # [F, 4, 4] frame-to-frame, scaled; None: no camera control
    event_id: int | None  # newest sampled event, echoed in frame headers and stats


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
