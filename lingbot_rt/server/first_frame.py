"""The first frame of an init -> uint8 [H, W, 3] at exactly the session's size.

An init gives it as bytes or a data: URL. If the operator allows it, also as a path inside one folder or a public URL.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import struct
import zlib
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lingbot_rt.errors import InvalidInit, one_line
from lingbot_rt.server.remote_picture import fetch
from lingbot_rt.shapes import FrameSize

FIELD = "first_frame"
MAX_DECODED_PIXELS = 64_000_000
MAX_FILE_BYTES = 64 * 2**20

_RUNS_PROGRAMS = {"EPS", "WMF"}
"""Formats whose Pillow plugin passes the file to another program or to the operating system."""

_PILLOW_FAILURES = (
    *(OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, AttributeError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow's plugins raise on broken files. These errors have no common base class."""


async def load_first_frame(
    value: bytes | str, size: FrameSize, *, folder: str | None, allow_remote: bool
) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3], read and decoded in a worker thread.

    Raises InvalidInit that says what is wrong and, if an option would allow it, which one.
    """
    return await asyncio.to_thread(lambda: decode_picture(_read(value, folder, allow_remote), size))


def decode_picture(data: bytes, size: FrameSize) -> npt.NDArray[np.uint8]:
    """Any picture that Pillow reads -> uint8 [H, W, 3], stretched (bicubic) to ``size``. Raises InvalidInit."""
    if not data:
        raise InvalidInit("no bytes, expected a picture (PNG, JPEG, WebP, ...)", field=FIELD)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise InvalidInit(
                    f"{image.width}x{image.height} pixels are too many, at most {MAX_DECODED_PIXELS // 10**6} million",
                    field=FIELD,
                )
            rgb = _as_rgb(ImageOps.exif_transpose(image))
            return np.asarray(rgb.resize((size.width, size.height), Image.Resampling.BICUBIC))
    except _PILLOW_FAILURES as error:
        raise InvalidInit(f"{len(data)} bytes are not a readable picture ({one_line(error)})", field=FIELD) from None


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _RUNS_PROGRAMS]


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip these to 8 bits. Here 16-bit grey keeps its upper byte.
        values = np.asarray(image).astype(np.float64)
        if image.mode != "F" and (image.mode != "I" or values.max(initial=0) > 255):
            values = values // 256
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")


def _read(value: bytes | str, folder: str | None, allow_remote: bool) -> bytes:
    if isinstance(value, bytes):
        return value
    scheme = value[:8].lower()
    if scheme.startswith("data:"):
        return _from_data_url(value)
    if scheme.startswith(("http://", "https://")):
        if not allow_remote:
            raise InvalidInit("this server takes no URLs (--allow-remote-first-frame); send the bytes", field=FIELD)
        return fetch(value)
    return _from_folder(value, folder)


def _from_data_url(value: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma:
        raise InvalidInit("the data: URL has no comma, expected data:image/png;base64,...", field=FIELD)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote_to_bytes(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInit(f"the data: URL's base64 is broken ({error})", field=FIELD) from None


def _from_folder(value: str, folder: str | None) -> bytes:
    if folder is None:
        raise InvalidInit("this server takes no paths (--first-frame-dir FOLDER); send the bytes", field=FIELD)
    root = Path(folder).resolve()
    try:
        path = (root / value).resolve()  # follows links, so the path that is checked is the one that is read
        if not path.is_relative_to(root):
            raise InvalidInit("the path leads out of --first-frame-dir", field=FIELD)
        if not path.is_file():
            raise InvalidInit("there is no such file in --first-frame-dir", field=FIELD)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInit(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB", field=FIELD)
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # unreadable, a NUL in the path, a loop of links
        raise InvalidInit(f"the file cannot be read ({type(error).__name__})", field=FIELD) from None
