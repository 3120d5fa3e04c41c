"""The first frame of an init -> uint8 [H, W, 3] at exactly the session's size.

An init gives it as bytes or a data: URL. If the operator allows it, also as a path inside one folder or a public URL.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.errors import InvalidFirstFrame
from lingbot_rt.server.daemon_pool import DaemonPool
from lingbot_rt.server.pictures.files import (
    LARGE_PIXELS,
    MAX_DECODED_PIXELS,
    PictureFile,
    check_size,
    damaged,
    read_picture_file,
)
from lingbot_rt.server.pictures.kinds import formats as _formats
from lingbot_rt.server.pictures.metadata import ORIENTATION
from lingbot_rt.server.pictures.source import read_source
from lingbot_rt.shapes import FrameSize

__all__ = ["MAX_DECODED_PIXELS", "decode_picture", "load_first_frame"]

_ORDINARY = DaemonPool(1, "first frames")
_LARGE = DaemonPool(1, "large first frames")
"""Large pictures wait for each other, and ordinary ones do not wait for them. At most two are decoded at a time."""

_BAND_PIXELS = 2**20
_REDUCED_SIDES = 2
"""A large picture is reduced while it is decoded, to no less than this many times the session's sides."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture of each EXIF orientation upright; 5 to 8 swap its sides."""

_PILLOW_FAILURES = (
    *(OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, AttributeError),
    *(RuntimeError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow's plugins raise on broken files. These errors have no common base class."""


async def load_first_frame(
    value: bytes | str, size: FrameSize, *, folder: str | None, allow_remote: bool
) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3], read and decoded in threads that serve nothing else.

    Raises InvalidFirstFrame that says what is wrong and, if an option would allow it, which one.
    """
    data = value if isinstance(value, bytes) else await read_source(value, folder, allow_remote)
    picture = await _ORDINARY.run(lambda: read_picture_file(data))
    return await (_LARGE if picture.is_large else _ORDINARY).run(lambda: _decode(picture, size))


def decode_picture(data: bytes, size: FrameSize) -> npt.NDArray[np.uint8]:
    """The bytes of a picture -> uint8 [H, W, 3], stretched (bicubic) to ``size``. Raises InvalidFirstFrame."""
    return _decode(read_picture_file(data), size)


def _decode(picture: PictureFile, size: FrameSize) -> npt.NDArray[np.uint8]:
    plugin = _formats()[picture.format]
    try:
        with Image.open(io.BytesIO(picture.data), formats=[plugin]) as image:
            check_size(replace(picture, width=image.width, height=image.height))
            orientation = picture.orientation
            if plugin == "AVIF":  # a property of the picture, which the decoder reports as a tag
                orientation = image.getexif().get(ORIENTATION, 1)
            sides = (size.height, size.width) if orientation >= 5 else (size.width, size.height)
            rgb = _as_small_rgb(image, sides)
            if orientation in _TURNS:
                rgb = rgb.transpose(_TURNS[orientation])
            return np.asarray(rgb.resize((size.width, size.height), Image.Resampling.BICUBIC))
    except _PILLOW_FAILURES:
        raise damaged(picture.format, f"{picture.width}x{picture.height} pixels") from None
    except MemoryError:
        raise InvalidFirstFrame(
            f"the server has no memory for a picture of {picture.width}x{picture.height} pixels now, try a smaller one"
        ) from None


def _as_small_rgb(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """RGB. Pictures above LARGE_PIXELS are reduced to between ``_REDUCED_SIDES`` times ``sides`` and their own."""
    factors = (1, 1)
    if image.width * image.height > LARGE_PIXELS:
        image.draft(None, (_REDUCED_SIDES * sides[0], _REDUCED_SIDES * sides[1]))
        factors = (
            max(image.width // (_REDUCED_SIDES * sides[0]), 1),
            max(image.height // (_REDUCED_SIDES * sides[1]), 1),
        )
    image.load()
    if image.mode == "RGB" and factors == (1, 1) and not image.has_transparency_data:
        return image
    to_rgb = _rgb_conversion(image)
    # In bands: a conversion of the whole would hold the picture several times.
    width, height = image.size
    rows = max(_BAND_PIXELS // width // factors[1], 1) * factors[1]
    rgb = Image.new("RGB", (math.ceil(width / factors[0]), math.ceil(height / factors[1])))
    for top in range(0, height, rows):
        band = to_rgb(image.crop((0, top, width, min(top + rows, height))))
        rgb.paste(band if factors == (1, 1) else band.reduce(factors), (0, top // factors[1]))
    return rgb


def _rgb_conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What turns parts of ``image`` into RGB, with transparent pixels on black."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip these to 8 bits. Here 16-bit grey keeps its upper byte.
        is_wide = image.mode != "F" and (image.mode != "I" or np.max(image.getextrema()) > 255)

        def from_grey(part: Image.Image) -> Image.Image:
            values = np.nan_to_num(np.asarray(part).astype(np.float64))
            grey = (values // 256 if is_wide else values).clip(0, 255).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")

        return from_grey
    if image.has_transparency_data:

        def on_black(part: Image.Image) -> Image.Image:
            part = part.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", part.size, (0, 0, 0, 255)), part).convert("RGB")

        return on_black
    return lambda part: part.convert("RGB")
