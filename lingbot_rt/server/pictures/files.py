"""Files of pictures, read before anything is decoded: how large the picture is, and the file without its metadata.

Everything here costs time and memory in proportion to the file, whatever its fields say. What is left for the decoder
is the pixels: no text, profile, thumbnail, second picture or further frame can refuse a picture or make it dear.
Of the metadata only the orientation is used, where it can be read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from lingbot_rt.errors import InvalidFirstFrame
from lingbot_rt.server.pictures import kinds, ppm
from lingbot_rt.server.pictures.avif import read_avif
from lingbot_rt.server.pictures.metadata import exif_orientation, raw_profile_orientation, xmp_orientation
from lingbot_rt.server.pictures.tiff import read_tiff

MAX_DECODED_PIXELS = 64_000_000
MAX_SIDE = 32_768

LARGE_PIXELS = 16_000_000
"""Above it, a picture is decoded in a line of its own and may be reduced while it is decoded."""

MAX_SLOW_PIXELS = 2_500_000
"""For what is decoded in Python: seconds, at this size."""

MAX_JPEG2000_PIXELS = 16_000_000
"""Its decoder takes four bytes per sample beside the picture."""

_COSTS = {"JPEG 2000": 8, "AVIF": 2}
"""How much longer a pixel takes than those of other formats."""

MAX_SCANS = 100
"""Of a progressive JPEG: each costs a pass over the whole picture. Encoders write about ten."""

MAX_TILE_PIXELS = 16_000_000
"""Of a TIFF: a tile is decoded as a whole, however small the picture is."""

MAX_PARTS = 2**16
"""Chunks, segments or entries in one file."""

MAX_GIF_BLOCKS = 2**19
"""Of 255 bytes at most, before a GIF's first frame."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture that may be decoded. ``data`` holds it in ``format`` (a name of ``kinds``)."""

    format: str
    data: bytes
    width: int  # as stored, pixels
    height: int
    orientation: int = 1  # EXIF: 1 to 8; 5 to 8 swap width and height
    is_slow: bool = False

    @property
    def is_large(self) -> bool:
        return self.is_slow or self.width * self.height * _COSTS.get(self.format, 1) > LARGE_PIXELS


def read_picture_file(data: bytes) -> PictureFile:
    """The picture in the bytes of a file. Raises InvalidFirstFrame: no picture, damaged, or too large."""
    name = kinds.format_of(data)
    if name is None or name not in kinds.formats():
        raise InvalidFirstFrame(f"{kinds.describe(data)}, {kinds.expected()}")
    try:
        picture = _READERS[name](data)
    except (struct.error, LookupError, ValueError, OverflowError):  # the last: a place beyond what an index can be
        raise damaged(name, f"{len(data)} bytes") from None
    if isinstance(picture, bytes):  # the picture inside an icon
        return read_picture_file(picture)
    if picture.width < 1 or picture.height < 1:
        raise damaged(name, f"{len(data)} bytes")
    check_size(picture)
    return picture


def check_size(picture: PictureFile) -> None:
    """Raises InvalidFirstFrame that names the limit."""
    width, height = picture.width, picture.height
    limit, of = MAX_DECODED_PIXELS, ""
    if picture.is_slow:
        limit, of = MAX_SLOW_PIXELS, f" for this kind of {picture.format}"
    elif picture.format == "JPEG 2000":
        limit, of = MAX_JPEG2000_PIXELS, " for JPEG 2000"
    if width * height > limit:
        raise InvalidFirstFrame(f"{width}x{height} pixels are too many{of}, at most {limit / 10**6:g} million are read")
    if max(width, height) > MAX_SIDE:
        raise InvalidFirstFrame(f"{width}x{height} pixels, at most {MAX_SIDE} per side are read")


def damaged(name: str, extent: str) -> InvalidFirstFrame:
    return InvalidFirstFrame(
        f"the {name} file of {extent} is damaged, cut off or of a rare kind, expected a whole picture"
    )


def _too_many_parts(limit: int = MAX_PARTS) -> InvalidFirstFrame:
    return InvalidFirstFrame(f"the file has more than {limit} parts, which is the most that is read")


# --- PNG ---

_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


def _png(data: bytes) -> PictureFile:
    parts, at, orientation, xmp, raw = [data[:8]], 8, None, None, None
    width, height = struct.unpack_from(">II", data, 16)
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name == b"IEND":
            break
        if name in _PNG_PIXELS:
            parts.append(data[at:end])
        elif name == b"eXIf":
            orientation = orientation or exif_orientation(data[at + 8 : end - 4])
        elif name == b"iTXt" and data[at + 8 : at + 30].startswith(b"XML:com.adobe.xmp\0\0"):
            xmp = xmp or xmp_orientation(data[at + 8 : end - 4])
        elif raw is None and name in (b"zTXt", b"tEXt") and data[at + 8 : at + 30] == b"Raw profile type exif\0":
            # Only the first: a small one can be long once it is unpacked.
            raw = raw_profile_orientation(data[at + 30 : end - 4], is_packed=name == b"zTXt") or 0
        at = end
    else:
        raise _too_many_parts()
    return PictureFile("PNG", b"".join([*parts, _PNG_END]), width, height, orientation or raw or xmp or 1)


# --- JPEG ---

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


def _jpeg(data: bytes) -> PictureFile:
    parts, at, orientation, xmp = [data[:2]], 2, None, None
    width = height = scans = 0
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if scans:  # what follows a scan's header is its pixels
            parts.append(data[at : found.start() if found else len(data)])
        if found is None or data[found.start() + 1] == _END_OF_IMAGE:
            break
        at, marker = found.start(), data[found.start() + 1]
        body_bytes = int.from_bytes(data[at + 2 : at + 4], "big") - 2 if at + 4 <= len(data) else len(data)
        end = at + 4 + body_bytes
        body = data[at + 4 : end]
        if end > len(data):
            if _is_jpeg_pixels(marker, body):
                found = None  # not the end of the picture, but of what is there of it
            break
        if marker in _START_OF_FRAME:
            rows, columns = struct.unpack_from(">HH", body, 1)
            width, height = max(width, columns), max(height, rows)
        scans += marker == _START_OF_SCAN
        if marker == 0xE1 and body.startswith(b"Exif\0"):
            orientation = orientation or exif_orientation(body[6:])
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or xmp_orientation(body)
        elif _is_jpeg_pixels(marker, body):
            parts.append(data[at:end])
        at = end
    else:
        raise _too_many_parts()
    if scans > MAX_SCANS:
        raise InvalidFirstFrame(f"a JPEG of {scans} scans, at most {MAX_SCANS} are read")
    if found is not None:
        parts.append(b"\xff\xd9")
    return PictureFile("JPEG", b"".join(parts), width, height, orientation or xmp or 1)


def _is_jpeg_pixels(marker: int, body: bytes) -> bool:
    """Whether a segment says something about the pixels: two of the application's do, by the colours they imply."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


# --- WebP ---

_WEBP_ALPHA, _WEBP_ANIMATED = 0x10, 0x02


def _webp(data: bytes) -> PictureFile:
    parts, at, orientation, xmp, frames = [], 12, None, None, 0
    sizes = []
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        body = data[at + 8 : at + 8 + length] if name in (b"EXIF", b"XMP ") else data[at + 8 : at + 24]
        if name == b"VP8X":
            sizes.append(tuple(1 + int.from_bytes(body[i : i + 3], "little") for i in (4, 7)))
            flags = body[0] & (_WEBP_ALPHA | _WEBP_ANIMATED)
            parts.append(data[at : at + 8] + bytes([flags]) + data[at + 9 : end])
        elif name == b"VP8 ":
            sizes.append(tuple(side & 0x3FFF for side in struct.unpack_from("<HH", body, 6)))
        elif name == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            sizes.append(((bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1))
        elif name == b"EXIF":
            orientation = orientation or exif_orientation(body.removeprefix(b"Exif\0\0"))
        elif name == b"XMP ":
            xmp = xmp or xmp_orientation(body)
        frames += name == b"ANMF"
        if name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM") or (name == b"ANMF" and frames == 1):
            parts.append(data[at:end])
        at = end
    else:
        raise _too_many_parts()
    content = b"WEBP" + b"".join(parts)
    width, height = (max(side) for side in zip(*sizes, strict=True))
    return PictureFile(
        "WebP", b"RIFF" + struct.pack("<I", len(content)) + content, width, height, orientation or xmp or 1
    )


# --- GIF ---


def _gif(data: bytes) -> PictureFile:
    """The screen, the colours and the first frame: comments and other extensions before it are left out."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + ((6 << (flags & 7)) if flags & 0x80 else 0)
    parts, blocks = [data[:at]], 0
    while data[at] in (0x21, 0):
        start, at = at, at + 2 * (data[at] == 0x21)  # a zero too many is passed by
        while data[at]:
            at += 1 + data[at]
            blocks += 1
        at += 1
        blocks += 1
        if blocks > MAX_GIF_BLOCKS:
            raise _too_many_parts(MAX_GIF_BLOCKS)
        if data[start : start + 2] == b"!\xf9":
            parts.append(data[start:at])
    if data[at] != 0x2C:
        raise ValueError
    left, top, columns, rows = struct.unpack_from("<HHHH", data, at + 1)
    parts.append(data[at:])
    return PictureFile("GIF", b"".join(parts), max(width, left + columns), max(height, top + rows))


# --- icons ---


def _from_icon(data: bytes) -> PictureFile | bytes:
    """The largest picture of a Windows icon or cursor: the bytes of a PNG, or an icon with that picture alone."""
    kind, count = struct.unpack_from("<HH", data, 2)
    entries = [struct.unpack_from("<BBBBHHII", data, 6 + 16 * index) for index in range(count)]

    def rank(entry: tuple[int, ...]) -> tuple[int, int]:
        width, height, colours, _, _, bits = entry[:6]
        depth = (bits if kind == 1 else 0) or max(colours - 1, 0).bit_length() or 256
        return -(width or 256) * (height or 256), depth

    entry = min(entries, key=rank)
    inner = data[entry[7] :]
    if kinds.format_of(inner) == "PNG":
        return inner
    width, rows, is_slow = _bitmap(inner, 0)
    height = rows // 2  # below the colours stands the mask
    header = struct.pack("<HHHBBBBHHII", 0, kind, 1, width & 255, height & 255, *entry[2:6], len(inner), 22)
    return PictureFile("ICO" if kind == 1 else "CUR", header + inner, width, height, is_slow=is_slow)


def _largest_in_icns(data: bytes) -> PictureFile | bytes:
    """The bytes of the largest PNG or JPEG 2000 in an Apple icon, or the icon itself if it holds none."""
    best, area, at = None, 0, 8
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, at + 4)
        inner = data[at + 8 : at + length]
        name = kinds.format_of(inner)
        if name in ("PNG", "JPEG 2000"):
            width, height = struct.unpack_from(">II", inner, 16) if name == "PNG" else _jpeg2000_size(inner)
            if best is None or width * height > area:
                best, area = inner, width * height
        if length < 8:
            break
        at += length
    else:
        raise _too_many_parts()
    return best or PictureFile("ICNS", data, 128, 128)  # the older kinds, at most


# --- the others ---


def _bmp(data: bytes) -> PictureFile:
    width, height, is_slow = _bitmap(data, 14)
    return PictureFile("BMP", data, width, height, is_slow=is_slow)


def _bitmap(data: bytes, at: int) -> tuple[int, int, bool]:
    """Width, height and whether it is run-length encoded (Pillow decodes that in Python), of the header at ``at``."""
    (header,) = struct.unpack_from("<I", data, at)
    if header == 12:
        return *struct.unpack_from("<HH", data, at + 4), False
    columns, rows, _, _, compression = struct.unpack_from("<iiHHI", data, at + 4)
    return abs(columns), abs(rows), compression in (1, 2)


def _jpeg2000(data: bytes) -> PictureFile:
    return PictureFile("JPEG 2000", data, *_jpeg2000_size(data))


def _jpeg2000_size(data: bytes) -> tuple[int, int]:
    """Of the code itself, and of the boxes around it if they say more."""
    at = data.find(b"\xff\x4f\xff\x51")
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8) if at >= 0 else (0, 0, 0, 0)
    (samples,) = struct.unpack_from(">H", data, at + 40) if at >= 0 else (1,)
    if samples > 4:
        raise ValueError
    sizes = [(right - left, bottom - top)]
    box = data.find(b"ihdr", 0, kinds.HEAD_BYTES)
    if box >= 0:
        rows, columns = struct.unpack_from(">II", data, box + 4)
        sizes.append((columns, rows))
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def _ppm(data: bytes) -> PictureFile:
    kind, width, height, _, _ = ppm.read_header(data)
    picture = PictureFile("PPM", data, width, height, is_slow=kind < 4)
    check_size(picture)
    return replace(picture, data=ppm.rewrite(data))


def _tiff(data: bytes) -> PictureFile:
    tiff = read_tiff(data)
    picture = PictureFile("TIFF", tiff.data, tiff.width, tiff.height, tiff.orientation)
    if tiff.tile_width * tiff.tile_height > MAX_TILE_PIXELS:
        raise InvalidFirstFrame(
            f"a TIFF of tiles of {tiff.tile_width}x{tiff.tile_height} pixels, "
            f"at most {MAX_TILE_PIXELS // 10**6} million are read"
        )
    return picture


def _avif(data: bytes) -> PictureFile:
    """Without EXIF and XMP. The orientation is a property of its own."""
    return PictureFile("AVIF", *read_avif(data))


def _at(layout: str, offset: int, name: str) -> Callable[[bytes], PictureFile]:
    """A reader of a format whose width and height stand at a fixed place."""

    def read(data: bytes) -> PictureFile:
        width, height = struct.unpack_from(layout, data, offset)
        return PictureFile(name, data, width, height, is_slow=name == "QOI")

    return read


def _pcx(data: bytes) -> PictureFile:
    left, top, right, bottom = struct.unpack_from("<HHHH", data, 4)
    return PictureFile("PCX", data, right - left + 1, bottom - top + 1)


_READERS: dict[str, Callable[[bytes], PictureFile | bytes]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "WebP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "AVIF": _avif,
    "JPEG 2000": _jpeg2000,
    "PPM": _ppm,
    "PCX": _pcx,
    "ICO": _from_icon,
    "CUR": _from_icon,
    "ICNS": _largest_in_icns,
    "QOI": _at(">II", 4, "QOI"),
    "TGA": _at("<HH", 12, "TGA"),
}
