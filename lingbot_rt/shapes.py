"""Every conversion between pixels, latents and tokens. The strides 8, 4 and 2 are defined only here."""

from __future__ import annotations

import re
from dataclasses import dataclass

VAE_SPATIAL_STRIDE = 8
"""Pixels per latent cell along each side."""

VAE_TEMPORAL_STRIDE = 4
"""Pixel frames per latent frame. The first latent frame of a session has only one."""

PATCH_SIZE = 2
"""Latent cells per token along each side. A token covers one latent frame in time."""

SIZE_MULTIPLE = VAE_SPATIAL_STRIDE * PATCH_SIZE
"""The width and height of a session are multiples of this many pixels."""

_SIZE = re.compile(r"\s*(\d{1,5})\s*[xX*]\s*(\d{1,5})\s*")


@dataclass(frozen=True, slots=True)
class FrameSize:
    """A picture's size in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> FrameSize:
        """``"832x480"`` -> FrameSize(832, 480). Raises ValueError when the text has another form."""
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not WIDTHxHEIGHT, for example 832x480")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one RGB24 frame."""
        return self.pixels * 3

    @property
    def is_whole_tokens(self) -> bool:
        """Whether width and height are a whole number of tokens."""
        return self.width % SIZE_MULTIPLE == 0 and self.height % SIZE_MULTIPLE == 0

    def nearest_valid(self, minimum: int, max_pixels: int) -> FrameSize:
        """The nearest size of whole tokens with width and height >= ``minimum`` and at most ``max_pixels`` pixels."""

        def snap(side: int) -> int:
            return max(round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE, -(-minimum // SIZE_MULTIPLE) * SIZE_MULTIPLE)

        width, height = snap(self.width), snap(self.height)
        if width * height > max_pixels:
            scale = (max_pixels / (self.width * self.height)) ** 0.5
            width = max(int(self.width * scale) // SIZE_MULTIPLE * SIZE_MULTIPLE, snap(minimum))
            height = max(int(self.height * scale) // SIZE_MULTIPLE * SIZE_MULTIPLE, snap(minimum))
            while width * height > max_pixels and max(width, height) > snap(minimum):
                if width >= height:
                    width -= SIZE_MULTIPLE
                else:
                    height -= SIZE_MULTIPLE
        return FrameSize(width, height)

    @property
    def latent_width(self) -> int:
        return self.width // VAE_SPATIAL_STRIDE

    @property
    def latent_height(self) -> int:
        return self.height // VAE_SPATIAL_STRIDE

    @property
    def tokens_per_frame(self) -> int:
        """Tokens per latent frame: 1560 at 832x480."""
        return (self.latent_width // PATCH_SIZE) * (self.latent_height // PATCH_SIZE)


def latent_frames_for(num_frames: int) -> int:
    """The ``num_frames`` of an init -> latent frames per chunk, F = (num_frames - 1) // 4 + 1."""
    return (num_frames - 1) // VAE_TEMPORAL_STRIDE + 1


def num_frames_for(latent_frames: int) -> int:
    """Latent frames per chunk -> the ``num_frames`` that asks for them: 3 -> 9."""
    return VAE_TEMPORAL_STRIDE * (latent_frames - 1) + 1


def pixel_frames_of_latent(latent_index: int) -> int:
    """Pixel frames of latent frame ``latent_index`` of a session: 1 for the first, then 4."""
    return 1 if latent_index == 0 else VAE_TEMPORAL_STRIDE


def latent_frame_of_pixel_frame(pixel_index: int) -> int:
    """Latent frame that pixel frame ``pixel_index`` of a session decodes from: 0 -> 0, 1 to 4 -> 1, 5 to 8 -> 2."""
    return (pixel_index + VAE_TEMPORAL_STRIDE - 1) // VAE_TEMPORAL_STRIDE


def pixel_frames_of_chunk(chunk_index: int, latent_frames: int) -> int:
    """Pixel frames of a chunk: 9, then 12, at three latent frames per chunk."""
    first = chunk_index * latent_frames
    return sum(pixel_frames_of_latent(first + i) for i in range(latent_frames))


FOCAL_PIXELS = 500.0
"""Focal length in pixels. The model was trained with this one at every size."""


def intrinsics(size: FrameSize) -> tuple[float, float, float, float]:
    """The camera's (fx, fy, cx, cy) in pixels."""
    return FOCAL_PIXELS, FOCAL_PIXELS, size.width / 2, size.height / 2
