"""An AVIF, read for the sizes of everything inside that its decoder would decode, and rid of what is beside it.

The size that the file states can differ from that of the AV1 pictures inside, which are decoded first and compared
afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

_MAX_PARTS = 2**16
_METADATA = (b"Exif", b"mime")
_SEQUENCE_HEADER = 1


@dataclass(slots=True)
class _Item:
    kind: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)  # (place in the file, bytes; 0 is up to the end)


def read_avif(data: bytes) -> tuple[bytes, int, int]:
    """The file without EXIF, XMP and further frames, and the largest width and height in it, pixels.

    Raises struct.error, LookupError or ValueError if its boxes cannot be read.
    """
    content = bytearray(data)
    top = {kind: (at, end) for kind, at, end in _boxes(data, 0, len(data))}
    if b"meta" not in top:
        raise ValueError("no items")
    content[8:12] = b"avif"  # one picture, also of a sequence
    at, end = top[b"meta"]
    boxes = {kind: (start, stop) for kind, start, stop in _boxes(data, at + 4, end)}
    items: dict[int, _Item] = {}
    _read_kinds(data, *boxes[b"iinf"], items, content)
    _read_places(data, boxes[b"iloc"][0], boxes.get(b"idat", (0, 0))[0], items)
    sizes = [_stated(data, *boxes[b"iprp"])]
    bytes_left, parts = len(data), _MAX_PARTS
    for item in items.values():
        if item.kind not in (b"av01", b"grid"):
            continue
        extents = [(start, start + count if count else len(data)) for start, count in item.extents]
        bytes_left -= sum(max(stop - start, 0) for start, stop in extents)
        if bytes_left < 0:
            raise ValueError("more bytes than there are")
        inside = b"".join(data[start:stop] for start, stop in extents)
        if item.kind == b"grid":
            sizes.append(_grid_size(inside))
            continue
        headers = []
        for kind, body in _units(inside):
            parts -= 1
            if kind == _SEQUENCE_HEADER:
                headers.append(_sequence_size(body))
            if parts < 0:
                raise ValueError("too many parts")
        if not headers:
            raise ValueError("no sequence header")
        sizes += headers
    return bytes(content), max(width for width, _ in sizes), max(height for _, height in sizes)


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin and end of the content) of the boxes between two places."""
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, begin)
            begin += 8
        stop = at + length if length else end
        if stop < begin:
            raise ValueError("a box is shorter than its head")
        yield kind, begin, min(stop, end)
        at = stop
    raise ValueError("too many parts")


def _read_kinds(data: bytes, at: int, end: int, items: dict[int, _Item], content: bytearray) -> None:
    """The items' kinds. Metadata becomes another kind in ``content``, which decoders pass by."""
    for kind, start, _ in _boxes(data, at + (8 if data[at] else 6), end):
        if kind != b"infe" or data[start] < 2:
            continue
        identifier = int.from_bytes(data[start + 4 : start + (6 if data[start] == 2 else 8)], "big")
        place = start + (8 if data[start] == 2 else 10)
        items.setdefault(identifier, _Item()).kind = data[place : place + 4]
        if data[place : place + 4] in _METADATA:
            content[place : place + 4] = b"none"


def _read_places(data: bytes, at: int, inside: int, items: dict[int, _Item]) -> None:
    """Where the items' bytes are. ``inside``: where the box for small items begins."""
    version = data[at]
    offset_bytes, length_bytes = data[at + 4] >> 4, data[at + 4] & 15
    base_bytes, index_bytes = data[at + 5] >> 4, data[at + 5] & 15 if version else 0
    at += 6

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > len(data):
            raise ValueError("cut off")
        return int.from_bytes(data[at - size : at], "big")

    parts = 0
    for _ in range(number(4 if version == 2 else 2)):
        item = items.setdefault(number(4 if version == 2 else 2), _Item())
        method = number(2) & 15 if version else 0
        number(2)
        base = number(base_bytes) + (inside if method == 1 else 0)
        for _ in range(number(2)):
            parts += 1
            if parts > _MAX_PARTS:
                raise ValueError("too many parts")
            number(index_bytes)
            start = base + number(offset_bytes)
            item.extents.append((start, number(length_bytes)))


def _stated(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The largest width and height among the properties."""
    width = height = 0
    boxes = {kind: (start, stop) for kind, start, stop in _boxes(data, at, end)}
    for kind, place, _ in _boxes(data, *boxes[b"ipco"]):
        if kind == b"ispe":
            columns, rows = struct.unpack_from(">II", data, place + 4)
            width, height = max(width, columns), max(height, rows)
    return width, height


def _grid_size(data: bytes) -> tuple[int, int]:
    """Of a picture that is put together from tiles."""
    width, height = struct.unpack_from(">II" if data[1] & 1 else ">HH", data, 4)
    return width, height


def _units(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the units of an AV1 picture."""
    at = 0
    while at < len(data):
        kind, has_extension, has_size = (data[at] >> 3) & 15, data[at] & 4, data[at] & 2
        at += 2 if has_extension else 1
        length = len(data) - at
        if has_size:
            length, at = _leb128(data, at)
        yield kind, data[at : at + min(length, 256)]
        at += length


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits -> (number, place behind it)."""
    value = 0
    for index in range(8):
        value |= (data[at + index] & 127) << (7 * index)
        if data[at + index] < 128:
            break
    return value, at + index + 1


def _sequence_size(header: bytes) -> tuple[int, int]:
    """The largest width and height in an AV1 sequence header."""
    bits, left = int.from_bytes(header, "big"), 8 * len(header)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise ValueError("cut off")
        return (bits >> left) & ((1 << count) - 1)

    take(4)  # profile, still picture
    if take(1):  # the short header of a still picture
        take(5)
    else:
        delay_bits = 0
        has_model = False
        if take(1):  # timing
            take(64)
            if take(1):
                zeros = 0
                while not take(1):
                    zeros += 1
                take(zeros)
            has_model = bool(take(1))
            if has_model:
                delay_bits = take(5) + 1
                take(42)
        has_delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if has_model and take(1):
                take(2 * delay_bits + 1)
            if has_delays and take(1):
                take(4)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    return take(width_bits) + 1, take(height_bits) + 1
