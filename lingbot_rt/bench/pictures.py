"""Moving pictures that compress about as generated ones do: no file, the same bytes from one seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.shapes import FrameSize

_STEP = 3  # pixels a frame: a slow walk
_SCALES = ((8, 60.0), (32, 30.0), (128, 12.0))  # cells along a frame's width, and how strong
_GRAIN = 2.0
_GREY = 128.0


def moving_pictures(size: FrameSize, count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A camera that glides over a landscape of clouds, with a little grain that changes in each frame.

    uint8 [count, H, W, 3]. The grain matters: pictures that shift exactly would flatter the lossless transports.
    """
    chance = np.random.default_rng(seed)
    width = size.width + _STEP * (count - 1)
    panorama = np.full((size.height, width, 3), _GREY, np.float32)
    for cells, strength in _SCALES:
        cell = max(size.width / cells, 1.0)
        coarse = (max(round(width / cell), 2), max(round(size.height / cell), 2))
        noise = chance.normal(0, strength, (coarse[1], coarse[0], 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel])
            panorama[..., channel] += np.asarray(layer.resize((width, size.height), Image.Resampling.BICUBIC))
    frames = np.empty((count, size.height, size.width, 3), np.uint8)
    for i in range(count):
        view = panorama[:, _STEP * i : _STEP * i + size.width]
        grain = chance.normal(0, _GRAIN, view.shape[:2]).astype(np.float32)
        frames[i] = np.clip(view + grain[..., None], 0, 255)
    return frames
