"""Writes pixel frames to an MP4 file (PyAV) or to a folder of PNGs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.errors import ConfigError, OutputFailed, reason_of

_CRF = "16"  # libx264's quality scale; differences are hard to see below 18


WriteFrame = Callable[[npt.NDArray[np.uint8]], None]
"""Takes pixel frames uint8 [H, W, 3], all of one size."""


@contextmanager
def open_writer(path: str | None, fps: float) -> Iterator[WriteFrame]:
    """NAME.mp4 -> a video at ``fps``, another name -> a folder of PNGs, None -> frames are discarded.

    Files and folders are made with the first frame, so that a session that never starts leaves everything as it was.
    Raises ConfigError if a video is asked for and PyAV is not installed, OutputFailed if the disk refuses a frame.
    """
    if path is None:
        yield lambda pixels: None
        return
    writer = Mp4File(Path(path), fps) if path.lower().endswith(".mp4") else PngFolder(Path(path))

    def write(pixels: npt.NDArray[np.uint8]) -> None:
        with _named(path):
            writer.add(pixels)

    try:
        yield write
    finally:
        with _named(path):
            writer.close()


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"{path}: {reason_of(error)}", field="out") from None


class PngFolder:
    """frame_00000.png, frame_00001.png and so on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self._folder / f"frame_{self._count:05d}.png")
        self._count += 1

    def close(self) -> None:
        """Every file is complete already."""


class Mp4File:
    """H.264 video at ``fps``. The first frame sets its size."""

    def __init__(self, path: Path, fps: float) -> None:
        try:
            import av
        except ImportError:
            raise ConfigError(
                f"--out {path} needs PyAV: pip install 'lingbot-rt[video]', or name a folder to get PNGs", field="out"
            ) from None
        self._av = av
        self._path = path
        self._file: Any = None
        self._fps = Fraction(fps).limit_denominator(1001)
        self._stream: Any = None

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        # yuv420p halves the chroma along both sides, so a picture of odd size loses its last row or column.
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._av.open(str(self._path), "w")
            self._stream = self._file.add_stream("libx264", rate=self._fps, options={"crf": _CRF})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        pixels = np.ascontiguousarray(pixels[:height, :width])
        self._file.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def close(self) -> None:
        if self._stream is not None:
            self._file.mux(self._stream.encode())
        if self._file is not None:
            self._file.close()
