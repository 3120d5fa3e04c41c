"""Animated WebP and GIF files, written frame by frame: a frame is encoded and forgotten, so that memory stays bounded.

Pillow encodes every frame as a file of its own. The classes here put the parts of these files into one animation.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

_WEBP_QUALITY = 90
_WEBP_EFFORT = 2  # Pillow's method: above it time doubles and files shrink by 4 %
_ANIMATION_FLAG = 0x02
_RIFF_HEADER = 12  # bytes before the first chunk of a WebP file

_GIF_HEADER = 13  # bytes before the palette of a GIF file
_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C
_GIF_LOOP = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"  # for ever
_GIF_END = b";"
_GIF_MAX_FPS = 50  # players show a frame for at least 2 hundredths of a second

Pixels = npt.NDArray[np.uint8]


class Clock:
    """The duration of each frame in whole units, such that the frames together keep the rate."""

    def __init__(self, fps: float, units_per_second: int) -> None:
        self._units_per_frame = units_per_second / fps
        self._count = 0

    def next(self) -> int:
        self._count += 1
        return round(self._count * self._units_per_frame) - round((self._count - 1) * self._units_per_frame)


class WebpFile:
    """An animated WebP at ``fps`` that repeats for ever. The first frame sets its size."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._clock = Clock(fps, 1000)
        self._file: IO[bytes] | None = None

    def add(self, pixels: Pixels) -> None:
        height, width = pixels.shape[:2]
        canvas = _u24(width - 1) + _u24(height - 1)
        if self._file is None:
            self._file = _opened(self.path)
            self._file.write(b"RIFF\0\0\0\0WEBP" + _chunk(b"VP8X", bytes([_ANIMATION_FLAG, 0, 0, 0]) + canvas))
            self._file.write(_chunk(b"ANIM", bytes(6)))
        still = io.BytesIO()
        Image.fromarray(pixels).save(still, "WEBP", quality=_WEBP_QUALITY, method=_WEBP_EFFORT)
        picture = still.getvalue()[_RIFF_HEADER:]
        self._file.write(_chunk(b"ANMF", bytes(6) + canvas + _u24(self._clock.next()) + b"\0" + picture))

    def close(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            size = file.tell() - 8  # without "RIFF" and the size itself
            file.seek(4)
            file.write(size.to_bytes(4, "little"))


class GifFile:
    """An animated GIF that repeats for ever, at ``fps`` or at 50 frames/s. Each frame has a palette of its own."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, min(fps, _GIF_MAX_FPS)
        self._clock = Clock(self.fps, 100)
        self._file: IO[bytes] | None = None

    def add(self, pixels: Pixels) -> None:
        if self._file is None:
            height, width = pixels.shape[:2]
            self._file = _opened(self.path)
            self._file.write(b"GIF89a" + _u16(width) + _u16(height) + bytes(3) + _GIF_LOOP)
        still = io.BytesIO()
        Image.fromarray(pixels).quantize(256, method=Image.Quantize.FASTOCTREE).save(still, "GIF", interlace=0)
        self._file.write(b"\x21\xf9\x04\0" + _u16(self._clock.next()) + bytes(2) + _gif_image(still.getvalue()))

    def close(self) -> None:
        if self._file is not None:
            with self._file as file:
                file.write(_GIF_END)


def _gif_image(still: bytes) -> bytes:
    """The picture of a GIF file that has one: its descriptor, its palette and its pixels."""
    table_bits = still[10] & 7
    at = _GIF_HEADER + 3 * 2 ** (table_bits + 1)
    table = still[_GIF_HEADER:at]
    while still[at] == _GIF_EXTENSION:
        at += 2
        while still[at]:
            at += 1 + still[at]
        at += 1
    assert still[10] & 0x80, "Pillow writes the palette into the header"
    assert still[at] == _GIF_IMAGE
    return still[at : at + 9] + bytes([0x80 | table_bits]) + table + still[at + 10 :].removesuffix(_GIF_END)


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a RIFF file. Its content is padded to an even length, which the size does not count."""
    return name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _u24(value: int) -> bytes:
    return value.to_bytes(3, "little")
