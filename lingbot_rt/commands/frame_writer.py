"""Writes pixel frames to a video (MP4, animated WebP or GIF) or to a folder of PNGs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.commands.animation import GifFile, WebpFile
from lingbot_rt.commands.options import FRAME_NAME, frames_are_files
from lingbot_rt.commands.output import complain
from lingbot_rt.errors import OutputFailed, one_line, reason_of

_CRF = "16"  # libx264's quality scale; differences are hard to see below 18
_CODEC = "libx264"


class FrameFile(Protocol):
    """Takes pixel frames uint8 [H, W, 3], all of one size."""

    path: Path
    fps: float

    def add(self, pixels: npt.NDArray[np.uint8]) -> None: ...

    def close(self) -> None: ...


class FrameWriter:
    """Called with one pixel frame uint8 [H, W, 3] after the other, all of one size."""

    def __init__(self, file: FrameFile | None) -> None:
        self._file = file
        self._saved = 0
        self._size = ""

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Raises OutputFailed if the disk or the format refuses the frame."""
        if self._file is None:
            return
        with _named(self._file.path):
            self._file.add(pixels)
        self._saved += 1
        self._size = f"{pixels.shape[1]}x{pixels.shape[0]}"

    @property
    def result(self) -> str | None:
        """What was saved where: ``clip.mp4: 33 frames of 160x96 at 16 frames/s``; None: nothing."""
        if self._file is None or not self._saved:
            return None
        return f"{self._file.path}: {self._saved} frames of {self._size} at {self._file.fps:g} frames/s"


@contextmanager
def open_writer(path: str | None, fps: float, *, overwrite: bool = False) -> Iterator[FrameWriter]:
    """A name that ends in .mp4, .webp or .gif -> a video at ``fps``, another name -> a folder of PNGs, None -> nothing.

    Files and folders are made with the first frame, so that a session that never starts leaves everything as it was.
    ``overwrite`` removes the frames of an earlier run from the folder, and nothing else. Without PyAV an MP4 becomes a
    WebP animation beside it. Raises OutputFailed if the disk refuses a frame.
    """
    if path is None:
        yield FrameWriter(None)
        return
    file = _file_for(path, fps, overwrite)
    try:
        yield FrameWriter(file)
    finally:
        with _named(file.path):
            file.close()


def _file_for(path: str, fps: float, overwrite: bool) -> FrameFile:
    target = Path(path)
    if frames_are_files(path):
        return PngFolder(target, fps, overwrite)
    kinds: dict[str, type[WebpFile] | type[GifFile]] = {".webp": WebpFile, ".gif": GifFile}
    if target.suffix.lower() in kinds:
        return kinds[target.suffix.lower()](target, fps)
    missing = why_no_mp4()
    if missing is None:
        return Mp4File(target, fps)
    numbers = ("", *(f"-{number}" for number in range(2, 10_000)))
    free = next(name for name in (target.with_name(f"{target.stem}{n}.webp") for n in numbers) if not name.exists())
    complain(f"{target}: {missing}; saving the WebP animation {free} instead")
    return WebpFile(free, fps)


def why_no_mp4() -> str | None:
    """What MP4 files need and this Python lacks; None: nothing."""
    try:
        import av
    except ImportError:
        return 'MP4 needs PyAV (in a checkout: pip install ".[video]"; elsewhere: pip install av)'
    return None if _CODEC in av.codecs_available else f"this PyAV has no encoder {_CODEC}"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"{path}: {reason_of(error)}", field="out") from None
    except ValueError as error:  # Pillow, for a size that the format does not have
        raise OutputFailed(f"{path}: {one_line(error)}", field="out") from None


class PngFolder:
    """frame_00000.png, frame_00001.png and so on."""

    def __init__(self, folder: Path, fps: float, overwrite: bool) -> None:
        self.path, self.fps = folder, fps
        self._overwrite = overwrite
        self._numbers = count()

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        number = next(self._numbers)
        if number == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self.path.iterdir() if self._overwrite else ():
                if FRAME_NAME.fullmatch(file.name):
                    file.unlink()
        Image.fromarray(pixels).save(self.path / f"frame_{number:05d}.png")

    def close(self) -> None:
        """Every file is complete already."""


class Mp4File:
    """H.264 video at ``fps``. The first frame sets its size."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._rate = Fraction(fps).limit_denominator(1001)
        self._file: Any = None
        self._stream: Any = None

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        import av

        # yuv420p halves the chroma along both sides, so a picture of odd size loses its last row or column.
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = av.open(str(self.path), "w", format="mp4")
            self._stream = self._file.add_stream(_CODEC, rate=self._rate, options={"crf": _CRF})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        pixels = np.ascontiguousarray(pixels[:height, :width])
        self._mux(av.VideoFrame.from_ndarray(pixels, format="rgb24"))

    def close(self) -> None:
        if self._stream is not None:
            self._mux(None)
        if self._file is not None:
            self._file.close()

    def _mux(self, frame: Any) -> None:
        """Encodes and writes a frame, or what the encoder still holds. Raises OSError or ValueError."""
        import av

        stream, self._stream = self._stream, None  # an encoder that failed is not asked again
        try:
            self._file.mux(stream.encode(frame))
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(str(error)) from None
        self._stream = stream
