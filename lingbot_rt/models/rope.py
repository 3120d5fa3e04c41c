"""Rotary position embedding over (time, height, width), interleaved pairs.

Shapes: B batch, N tokens, H heads, D head_dim; tables [N, D / 2], or [B, N, D / 2] when samples differ.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many dimensions of a head rotate with time, height and width: d - 4 (d // 6), 2 (d // 6), 2 (d // 6)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=4)
def rope_tables(
    head_dim: int, start_frame: int, frames: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [frames * height * width, head_dim / 2] for absolute latent frames from ``start_frame`` on.

    Angles are computed in float64, tables are float32. Height and width count tokens. The newest tables are cached,
    as all forwards of a chunk use the same ones.
    """
    # Not in inference mode: a training loop may be the next to get the cached tensors.
    with torch.inference_mode(False):
        return _tables(head_dim, range(start_frame, start_frame + frames), height, width, device)


def _tables(
    head_dim: int, frame_numbers: range, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    positions = (
        torch.arange(frame_numbers.start, frame_numbers.stop, dtype=torch.float64, device=device),
        torch.arange(height, dtype=torch.float64, device=device),
        torch.arange(width, dtype=torch.float64, device=device),
    )
    angles = []
    for axis, (position, dims) in enumerate(zip(positions, axis_dims(head_dim), strict=True)):
        frequency = THETA ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)
        shape = [1, 1, 1, len(frequency)]
        shape[axis] = len(position)
        angles.append(torch.outer(position, frequency).view(shape).expand(len(frame_numbers), height, width, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[2i], x[2i + 1]) by its token's angle, in float32; returns the dtype of ``x_BNHD``."""
    even, odd = x_BNHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BNHD.dtype)
