"""The orientation in EXIF and XMP, the only metadata of a picture that is used."""

from __future__ import annotations

import re
import struct
import zlib

ORIENTATION = 0x0112

_MAX_TAGS = 1000
_MAX_XMP_BYTES = 2**20
_MAX_PROFILE_BYTES = 2**14
_XMP = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])\s*[\"'<]")
_INTEGERS = {1: "B", 3: "H", 4: "I"}
"""EXIF's types of whole numbers."""


def exif_orientation(exif: bytes) -> int | None:
    """1 to 8; None: there is none, or it cannot be read. Other tags are not looked at."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * min(count, _MAX_TAGS), 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == ORIENTATION:
                return valid_orientation(exif, entry + 8, order, kind) if number == 1 else None
    except struct.error:
        pass
    return None


def valid_orientation(data: bytes, at: int, order: str, kind: int) -> int | None:
    """The value of an orientation's tag that stands at ``at``; ``kind`` is its type."""
    if kind not in _INTEGERS:
        return None
    (value,) = struct.unpack_from(order + _INTEGERS[kind], data, at)
    return value if 1 <= value <= 8 else None


def raw_profile_orientation(chunk: bytes, is_packed: bool) -> int | None:
    """Of EXIF that older programs wrote into a PNG's text, in hexadecimal; ``chunk`` is what follows the key word."""
    try:
        text = zlib.decompressobj().decompress(chunk[1:], _MAX_PROFILE_BYTES) if is_packed else chunk
        # A line break, the kind, the length, then the digits.
        digits = b"".join(text[:_MAX_PROFILE_BYTES].split(b"\n", 3)[3].split())
        return exif_orientation(bytes.fromhex(digits[: len(digits) // 2 * 2].decode()).removeprefix(b"Exif\0\0"))
    except (zlib.error, ValueError, IndexError):
        return None


def xmp_orientation(xmp: bytes) -> int | None:
    """1 to 8; None: there is none, or it cannot be read."""
    found = _XMP.search(xmp, 0, _MAX_XMP_BYTES)
    return int(found[1]) if found else None
