"""Frames to keep: an MP4 file (PyAV) or a folder of PNGs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.errors import ConfigError

_CRF = "16"  # libx264's quality scale: below 18 a difference is hard to see


class Clip:
    """Takes pixel frames uint8 [H, W, 3], all of one size. This one keeps nothing."""

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """The next frame."""

    def close(self) -> None:
        """Finishes the file."""

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PngFolder(Clip):
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._count = 0

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        Image.fromarray(pixels).save(self._folder / f"frame_{self._count:05d}.png")
        self._count += 1


class Mp4(Clip):
    """H.264, at ``fps``. The picture's size comes with the first frame."""

    def __init__(self, path: Path, fps: float) -> None:
        try:
            import av
        except ImportError:
            raise ConfigError(
                f"{path} needs PyAV: pip install 'lingbot-rt[video]', or name a folder to get PNGs", field="out"
            ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._av = av
        self._file = av.open(str(path), "w")
        self._fps = Fraction(fps).limit_denominator(1001)
        self._stream: Any = None

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        # Chroma is halved along both sides: an odd preview loses its last row or column.
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        if self._stream is None:
            self._stream = self._file.add_stream("libx264", rate=self._fps, options={"crf": _CRF})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        pixels = np.ascontiguousarray(pixels[:height, :width])
        self._file.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def close(self) -> None:
        if self._stream is not None:
            self._file.mux(self._stream.encode())
        self._file.close()


def open_clip(out: str | None, fps: float) -> Clip:
    """``clip.mp4`` -> Mp4, another name -> a folder of PNGs, None -> nothing kept. Raises ConfigError without PyAV."""
    if out is None:
        return Clip()
    return Mp4(Path(out), fps) if out.lower().endswith(".mp4") else PngFolder(Path(out))
