"""Synthetic moving pictures that compress about as well as generated frames. The same seed gives the same bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.shapes import FrameSize

_STEP = 3  # pixels of camera motion per frame: a slow walk
_SCALES = ((8, 60.0), (32, 30.0), (128, 12.0))  # (noise cells across the frame, their standard deviation)
_GRAIN = 2.0
_GREY = 128.0


def moving_pictures(size: FrameSize, count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [count, H, W, 3]: a view that pans over smooth noise, plus a little new grain in every frame.

    Without the grain each frame would be an exact shift of the last one, which the lossless transports compress better
    than generated frames.
    """
    random = np.random.default_rng(seed)
    width = size.width + _STEP * (count - 1)
    panorama = np.full((size.height, width, 3), _GREY, np.float32)
    for cells, strength in _SCALES:
        cell = max(size.width / cells, 1.0)
        coarse = (max(round(width / cell), 2), max(round(size.height / cell), 2))
        noise = random.normal(0, strength, (coarse[1], coarse[0], 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel])
            panorama[..., channel] += np.asarray(layer.resize((width, size.height), Image.Resampling.BICUBIC))
    frames = np.empty((count, size.height, size.width, 3), np.uint8)
    for i in range(count):
        view = panorama[:, _STEP * i : _STEP * i + size.width]
        grain = random.normal(0, _GRAIN, view.shape[:2]).astype(np.float32)
        frames[i] = np.clip(view + grain[..., None], 0, 255)
    return frames
