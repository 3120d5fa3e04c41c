"""Camera poses -> the ray map that modulates the DiT.

A pixel's six channels are the origin and the unit direction of its ray, in the coordinates of the frame before. The
checkpoint calls the map plucker, but it has no o x d. F latent frames, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lingbot_rt.models.transfer import to_device
from lingbot_rt.shapes import VAE_SPATIAL_STRIDE, FrameSize, intrinsics


def ray_map(
    relative_poses: npt.NDArray[np.float64],
    size: FrameSize,
    device: torch.device,
    lenses: npt.NDArray[np.float64] | None = None,
) -> Tensor:
    """Relative poses [F, 4, 4] (camera to the frame before, scaled) -> float32 [1, 384, F, h, w].

    ``lenses``: (fx, fy, cx, cy) of each latent frame in pixels of ``size``, [F, 4]; None: the model's own lens.
    Channel = c * 64 + dy * 8 + dx, with c over (origin xyz, direction xyz). Pixel centres are at +0.5.
    """
    pose_F44 = to_device(torch.tensor(relative_poses, dtype=torch.float32), device)
    rows = [intrinsics(size)] if lenses is None else np.unique(lenses, axis=0).tolist()
    if len(rows) == 1:
        direction_FHW3 = _directions(pose_F44, size, rows[0])
    else:
        assert lenses is not None
        each = [_directions(pose_F44[i : i + 1], size, lens) for i, lens in enumerate(lenses.tolist())]
        direction_FHW3 = torch.cat(each)
    origin_FHW3 = pose_F44[:, None, None, :3, 3].expand_as(direction_FHW3)
    rays_FHW6 = torch.cat([origin_FHW3, direction_FHW3], dim=-1)
    stride = VAE_SPATIAL_STRIDE
    folded = rays_FHW6.unflatten(1, (-1, stride)).unflatten(3, (-1, stride))  # F h dy w dx 6
    return folded.permute(5, 2, 4, 0, 1, 3).flatten(0, 2)[None]


def _directions(pose_F44: Tensor, size: FrameSize, lens: Sequence[float]) -> Tensor:
    """The unit direction of every pixel's ray through ``lens``, turned by each pose: [F, H, W, 3]."""
    fx, fy, cx, cy = lens
    x = (torch.arange(size.width, dtype=torch.float32, device=pose_F44.device) + 0.5 - cx) / fx
    y = (torch.arange(size.height, dtype=torch.float32, device=pose_F44.device) + 0.5 - cy) / fy
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    rays_HW3 = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], dim=-1)
    rays_HW3 = rays_HW3 / rays_HW3.norm(dim=-1, keepdim=True)
    return torch.einsum("fij,hwj->fhwi", pose_F44[:, :3, :3], rays_HW3)
