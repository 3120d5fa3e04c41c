"""The largest window that fits on a card of a given size, for a model, a frame size and number formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lingbot_rt.engine.memory import Setup, session_memory
from lingbot_rt.engine.model_memory import ModelCounts
from lingbot_rt.models.checkpoint import CheckpointFolder, empty_vae, open_checkpoint
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.model_path import DUMMY, LINGBOT_WORLD_FAST
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.shapes import FrameSize

CARDS_GB = (24, 32, 48, 80, 141)
"""Memory of common cards. Of a card of N GB, N x 10^9 bytes count: the driver takes the rest of its N x 2^30."""

SIZES = (FrameSize(832, 480), FrameSize(640, 352))


@dataclass(frozen=True, slots=True)
class Precision:
    """Number formats of the DiT's linears and of the window."""

    name: str
    quantization: str  # as --quantization
    window_dtype: torch.dtype


PRECISIONS = (
    Precision("bfloat16", "none", torch.bfloat16),
    Precision("fp8 linears", "fp8", torch.bfloat16),
    Precision("fp8 linears, fp8 window", "fp8", torch.float8_e4m3fn),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model takes on one GPU at one precision."""

    setup: Setup
    weights: int  # bytes on the device

    @classmethod
    def of(cls, folder: CheckpointFolder, precision: Precision, vae_dtype: torch.dtype = torch.bfloat16) -> Estimate:
        """With the text encoder on the host. Reads configurations and allocates nothing."""
        found = ModelCounts.of(folder).nbytes(torch.bfloat16, vae_dtype, precision.quantization)
        with torch.device("meta"):
            vae = StreamingVAE(torch.nn.Module.to(empty_vae(folder), vae_dtype))
        setup = Setup(
            config=folder.dit_config,
            vae=vae,
            dtype=torch.bfloat16,
            window_dtype=precision.window_dtype,
            quantization=precision.quantization,
            converts_window=precision.window_dtype != torch.bfloat16,
        )
        text = found.text_encoder
        return cls(setup, found.dit.total + found.vae + text.streamed - text.outside)

    def peak(self, size: FrameSize, window_frames: int) -> int:
        """Bytes of weights and a session with this window."""
        latent_frames = self.setup.config.latent_frames
        return self.weights + session_memory(self.setup, size, latent_frames, window_frames).total_bytes

    def largest_window(self, size: FrameSize, free: int) -> int:
        """Latent frames of the largest window in ``free`` bytes; 0 if not even one chunk fits."""
        smallest = self.setup.config.latent_frames
        beside = self.peak(size, 0)
        frames = (free - beside) // (self.peak(size, 1) - beside)
        return frames if frames >= smallest else 0


def capacity_table(cards: Mapping[str, int]) -> list[list[str]]:
    """The largest windows of the published 14B, with a header, for cards by name and free bytes.

    A cell has latent frames for each of SIZES; ``-`` is none, and the model's own window and more end with ``+``.
    """
    folder = open_checkpoint(LINGBOT_WORLD_FAST, load_format=DUMMY)
    estimates = [Estimate.of(folder, precision) for precision in PRECISIONS]
    rows = [["card", *(f"{precision.name}, {size}" for precision in PRECISIONS for size in SIZES)]]
    for name, free in cards.items():
        windows = [estimate.largest_window(size, free) for estimate in estimates for size in SIZES]
        rows.append([name, *(_shown(window) for window in windows)])
    return rows


def _shown(window: int) -> str:
    own = DiTConfig().window_frames
    return f"{own}+" if window >= own else str(window or "-")
