"""MessagePack as existing clients read it: a walk over the bytes that knows only their types."""

from __future__ import annotations


def check_old_clients_can_read(data: bytes) -> None:
    """Fails on negative integers, uint64, int8..64, str32, map32, ext, and on bytes left over."""
    end = _walk(data, 0)
    assert end == len(data), "bytes left over"


def _walk(data: bytes, at: int) -> int:
    tag = data[at]
    at += 1
    if tag <= 0x7F or tag in (0xC0, 0xC2, 0xC3):  # fixint, nil, false, true
        return at
    if tag <= 0x8F:
        return _walk_many(data, at, 2 * (tag & 0x0F))
    if tag <= 0x9F:
        return _walk_many(data, at, tag & 0x0F)
    if tag <= 0xBF:
        return at + (tag & 0x1F)
    fixed = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4}  # float32, float64, uint8, uint16, uint32
    if tag in fixed:
        return at + fixed[tag]
    sized = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2}  # bin8..32, str8, str16
    if tag in sized:
        width = sized[tag]
        return at + width + int.from_bytes(data[at : at + width], "big")
    if tag in (0xDC, 0xDD):  # array16, array32
        width = 2 if tag == 0xDC else 4
        return _walk_many(data, at + width, int.from_bytes(data[at : at + width], "big"))
    if tag == 0xDE:  # map16
        return _walk_many(data, at + 2, 2 * int.from_bytes(data[at : at + 2], "big"))
    raise AssertionError(f"type byte {tag:#04x} at {at - 1}: existing clients fail on it")


def _walk_many(data: bytes, at: int, count: int) -> int:
    for _ in range(count):
        at = _walk(data, at)
    return at
