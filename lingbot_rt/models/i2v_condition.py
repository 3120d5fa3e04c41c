"""The i2v condition of a session: a mask and the first frame's latents, input of every forward beside the noise.

Shapes: B images (1 in a session), z latent channels, F latent frames per chunk, h x w latent cells, T pixel frames.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lingbot_rt.shapes import num_frames_for

MASK_CHANNELS = 4
"""Mask channels of the i2v condition: one for each pixel frame of a latent frame. All four are equal here."""


def preprocess_image(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in [-1, 1]."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    return image.float() / 127.5 - 1


def condition_video(image: Tensor, latent_frames: int) -> Tensor:
    """Images [B, 3, H, W] -> the video to encode, [B, 3, T, H, W]: the image, then frames of 0.0 (mid-grey).

    It covers two chunks: every later chunk has the condition of the second.
    """
    blank = image.new_zeros(len(image), 3, num_frames_for(2 * latent_frames) - 1, *image.shape[2:])
    return torch.cat([image[:, :, None], blank], dim=2)


def condition_chunks(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [B, z, 2F, h, w] of ``condition_video`` -> conditions [B, 4 + z, F, h, w] of chunk 0 and later chunks."""
    mask = latents.new_zeros(len(latents), MASK_CHANNELS, *latents.shape[2:])
    mask[:, :, 0] = 1
    condition = torch.cat([mask, latents], dim=1)
    first, later = condition.chunk(2, dim=2)
    return first.contiguous(), later.contiguous()
