"""Pictures for tests: of every format, with whatever metadata a test wants beside the pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from lingbot_rt.shapes import FrameSize

SIZE = FrameSize(64, 48)

QUARTERS = np.zeros((48, 64, 3), np.uint8)
"""Red, green / blue, white."""
QUARTERS[:24, :32], QUARTERS[:24, 32:] = (220, 20, 20), (20, 200, 20)
QUARTERS[24:, :32], QUARTERS[24:, 32:] = (20, 20, 220), (240, 240, 240)

IMAGE = Image.fromarray(QUARTERS)
MIDDLES = ((12, 16), (12, 48), (36, 16), (36, 48))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def middles(pixels: np.ndarray) -> np.ndarray:
    """The colours of the four quarters, [4, 3]."""
    return np.array([pixels[place] for place in MIDDLES], np.int64)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*before: bytes, after: Iterable[bytes] = (), width: int = 64, height: int = 48) -> bytes:
    """The quarters with chunks ``before`` and ``after`` the pixels; another size makes a picture of too few pixels."""
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in QUARTERS))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [header, *before, chunk(b"IDAT", rows), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF directory of (number, type, count, value of at most 4 bytes)."""
    table = b"".join(
        struct.pack("<HHI", number, kind, count) + value.ljust(4, b"\0") for number, kind, count, value in tags
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + table + bytes(4)


ORIENTATION_6 = (0x0112, 3, 1, b"\x06\0")
WRONG_TAGS = ((0x011A, 2, 4, b"72d\0"), (0x0100, 5, 1, b"\xff\xff\xff\xff"), (0x8769, 2, 9, b"\xff\xff\xff\x7f"))
"""A resolution as text, a width that lies outside, a directory that is a text outside."""


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg(*segments: bytes, **options) -> bytes:
    """The quarters with ``segments`` after the first marker."""
    data = saved(IMAGE, "JPEG", quality=95, **options)
    return data[:2] + b"".join(segments) + data[2:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp(*extra: tuple[bytes, bytes], flags: int = 0) -> bytes:
    """The quarters, lossless, in the extended form, with chunks after the pixels."""
    pixels = saved(IMAGE, "WEBP", lossless=True)
    (length,) = struct.unpack_from("<I", pixels, 16)
    header = bytes([flags, 0, 0, 0]) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    return riff((b"VP8X", header), (b"VP8L", pixels[20 : 20 + length]), *extra)


def gif(*extensions: bytes, **options) -> bytes:
    """The quarters with ``extensions`` before the picture."""
    data = saved(IMAGE.quantize(4), "GIF", **options)
    at = 13 + (6 << (data[10] & 7))
    return data[:at] + b"".join(extensions) + data[at:]


def gif_extension(label: int, *blocks: bytes) -> bytes:
    return bytes([0x21, label]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def tiff(*tags: tuple[int, int, int, bytes], side: tuple[int, int] = (64, 48), base: int = 0) -> bytes:
    """The quarters, uncompressed in one strip, with further ``tags`` (values of at most 4 bytes)."""
    pixels = QUARTERS.tobytes()
    numbers = {256: side[0], 257: side[1], 258: 8, 259: 1, 262: 2, 273: 8, 277: 3, 278: side[1], 279: len(pixels)}
    entries = [(number, 4, 1, struct.pack("<I", value)) for number, value in numbers.items()]
    given = {tag[0] for tag in tags}
    entries = sorted([entry for entry in entries if entry[0] not in given] + list(tags))
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    directory = struct.pack("<H", len(entries)) + table + struct.pack("<I", base)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def icon(*pictures: bytes, kind: int = 1, sides: tuple[int, int] = (16, 16)) -> bytes:
    """A Windows icon (1) or cursor (2) whose directory says ``sides`` of every picture."""
    header, at = struct.pack("<HHH", 0, kind, len(pictures)), 6 + 16 * len(pictures)
    for picture in pictures:
        header += struct.pack("<BBBBHHII", *sides, 0, 0, 1, 32, len(picture), at)
        at += len(picture)
    return header + b"".join(pictures)


def apple_icon(*pictures: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack(">I", 8 + len(data)) + data for kind, data in pictures)
    return b"icns" + struct.pack(">I", 8 + len(body)) + body


def bitmap(width: int, height: int, pixels: bytes = b"", bits: int = 32) -> bytes:
    """As in icons: a header without the file's own, and twice the height."""
    return struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, bits, 0, len(pixels), 0, 0, 0, 0) + pixels
