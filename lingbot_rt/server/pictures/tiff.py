"""The directory of a TIFF, written anew: the tags that say how the first picture's pixels are stored, and no other."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from lingbot_rt.server.pictures.metadata import ORIENTATION, valid_orientation

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_SAMPLES, _ROWS_PER_STRIP, _PLANES = 277, 278, 284

_PIXELS = {
    *(_WIDTH, _HEIGHT, 258, 259, 262, 266, _STRIPS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANES, 292, 293),
    *(317, 320, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, 332, 338, 339, 340, 341, 347),
    *(512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 50674),
}
"""Size, samples, compression, colours, strips and tiles, and the parameters of the compressions."""

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}

_LONG = {_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES, 320, 347}
"""Tags of one value per strip or tile, the palette, and the tables of JPEG."""

_MAX_LONG, _MAX_SHORT = 2**18, 2**10
"""Values of one tag: more than the strips or tiles of the largest picture."""

_MAX_SAMPLES = 6
"""Per pixel, as Pillow has it."""

_MAX_TAGS = 2**16


@dataclass(frozen=True, slots=True)
class Tiff:
    data: bytes
    width: int
    height: int
    tile_width: int  # of a tile; 1 where there are none
    tile_height: int
    orientation: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Classic TIFF counts in 4 bytes, BigTIFF in 8."""

    order: str
    is_big: bool

    def unpack(self, kinds: str, data: bytes, at: int) -> tuple[int, ...]:
        """``kinds``: struct's letters; N is the number of entries, P a place or count."""
        return struct.unpack_from(self._letters(kinds), data, at)

    def pack(self, kinds: str, *values: int) -> bytes:
        return struct.pack(self._letters(kinds), *values)

    def _letters(self, kinds: str) -> str:
        return self.order + kinds.replace("N", "Q" if self.is_big else "H").replace("P", "Q" if self.is_big else "I")


def read_tiff(data: bytes) -> Tiff:
    """The first picture of a TIFF. Raises struct.error, KeyError or ValueError if its directory cannot be read."""
    order = "<" if data.startswith(b"II") else ">"
    layout = _Layout(order, is_big=struct.unpack_from(f"{order}H", data, 2)[0] == 43)
    place = 8 if layout.is_big else 4  # bytes of a count or place, and of the values that an entry holds itself
    (at,) = layout.unpack("P", data, place)
    (count,) = layout.unpack("N", data, at)
    at += 8 if layout.is_big else 2
    entry_bytes = 4 + 2 * place
    count = min(count, _MAX_TAGS, max(len(data) - at, 0) // entry_bytes)
    entries: dict[int, bytes] = {}
    counts: dict[int, int] = {}
    numbers: dict[int, int] = {}  # the tags of one whole number
    orientation = None
    for entry in range(at, at + entry_bytes * count, entry_bytes):
        tag, kind, values = layout.unpack("HHP", data, entry)
        value_at = entry + 4 + place
        if tag == ORIENTATION and values == 1:
            orientation = orientation or valid_orientation(data, value_at, order, kind)
        if tag not in _PIXELS or tag in entries or kind not in _TYPE_BYTES:
            continue
        length = values * _TYPE_BYTES[kind]
        limit = _MAX_LONG if tag in _LONG else _MAX_SHORT
        if values > limit or (length > place and layout.unpack("P", data, value_at)[0] + length > len(data)):
            continue
        if values == 1 and kind in _INTEGERS:
            (numbers[tag],) = struct.unpack_from(order + _INTEGERS[kind], data, value_at)
        counts[tag] = values
        entries[tag] = data[entry : entry + entry_bytes]
    _check_parts(numbers, counts)
    directory = b"".join([layout.pack("N", len(entries)), *(entries[tag] for tag in sorted(entries)), bytes(place)])
    header = data[:place] + layout.pack("P", len(data) + len(data) % 2)
    return Tiff(
        b"".join([header, data[2 * place :], bytes(len(data) % 2), directory]),
        numbers[_WIDTH],
        numbers[_HEIGHT],
        numbers.get(_TILE_WIDTH, 1),
        numbers.get(_TILE_HEIGHT, 1),
        orientation or 1,
    )


def _check_parts(numbers: dict[int, int], counts: dict[int, int]) -> None:
    """Raises ValueError if there are more strips or tiles than the picture has: Pillow would decode them all."""
    width, height = numbers[_WIDTH], numbers[_HEIGHT]
    samples = numbers.get(_SAMPLES, 1)
    if samples > _MAX_SAMPLES:
        raise ValueError("too many samples per pixel")
    planes = samples if numbers.get(_PLANES) == 2 else 1
    rows = max(min(numbers.get(_ROWS_PER_STRIP, height), height), 1)
    columns, lines = max(numbers.get(_TILE_WIDTH, width), 1), max(numbers.get(_TILE_HEIGHT, height), 1)
    strips = math.ceil(height / rows)
    tiles = math.ceil(width / columns) * math.ceil(height / lines)
    if counts.get(_STRIPS, 0) > strips * planes or counts.get(_TILES, 0) > tiles * planes:
        raise ValueError("more strips or tiles than the picture has")
