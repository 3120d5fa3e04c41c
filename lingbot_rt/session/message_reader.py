"""Reads the bytes of one client message: one pass over a MessagePack map, within limits, key by key.

A client chooses the bytes, so depth and number of values are checked before anything is built, what stands under an
unknown key is skipped, and what no field takes becomes an ``Unusable``, which the field's own check refuses by name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Any

MAX_DEPTH = 32
"""Deepest nesting of lists and maps in a message. What the tables of the wire need is 9."""

_COPY_BYTES = 2**20
_WHOLE = (-(2.0**63), 2.0**64)
"""Floats from the first to below the second have an integer in MessagePack."""
_NIL, _FALSE, _TRUE, _NEVER_USED = 0xC0, 0xC2, 0xC3, 0xC1

_NUMBERS = {
    0xCA: Struct(">f"),
    0xCB: Struct(">d"),
    0xCC: Struct(">B"),
    0xCD: Struct(">H"),
    0xCE: Struct(">I"),
    0xCF: Struct(">Q"),
    0xD0: Struct(">b"),
    0xD1: Struct(">h"),
    0xD2: Struct(">i"),
    0xD3: Struct(">q"),
}
_SIZED = {
    0xC4: ("bin", Struct(">B")),
    0xC5: ("bin", Struct(">H")),
    0xC6: ("bin", Struct(">I")),
    0xC7: ("ext", Struct(">B")),
    0xC8: ("ext", Struct(">H")),
    0xC9: ("ext", Struct(">I")),
    0xD9: ("str", Struct(">B")),
    0xDA: ("str", Struct(">H")),
    0xDB: ("str", Struct(">I")),
    0xDC: ("list", Struct(">H")),
    0xDD: ("list", Struct(">I")),
    0xDE: ("map", Struct(">H")),
    0xDF: ("map", Struct(">I")),
}
"""First byte -> kind, and the form of the size or count behind it."""

_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_UNDEFINED = (0, b"\0")
"""Type and bytes of the extension that JavaScript libraries pack ``undefined`` as: it counts as nil."""

_EXTENSIONS = {
    -1: "a time; send milliseconds as a number",
    0x0D: "a Date of msgpack-lite; send milliseconds as a number",
    0x12: "a Uint8Array of msgpack-lite; send a Buffer",
    0x1A: "an ArrayBuffer of msgpack-lite; send a Buffer",
    0x62: "bundled strings of msgpackr; pack with bundleStrings false",
    0x72: "a record of msgpackr; pack with useRecords false",
    0x74: "a typed array of msgpackr; pack with moreTypes false",
}
"""Type of an extension -> what known libraries mean by it, and what to do instead."""

_KINDS = {"value": "a single value", "bin": "bin", "ext": "an extension", "str": "a string", "list": "a list"}


class Unreadable(Exception):
    """The bytes are no message. ``path`` leads to the place, from the outside in."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.path: list[str | int] = []


@dataclass(frozen=True, slots=True)
class Unusable:
    """A value that MessagePack has and no field takes. ``str``: what it is and what to send instead."""

    what: str

    def __str__(self) -> str:
        return self.what


class MessageReader:
    """One message. ``values`` counts what was read so far: every item, key and container."""

    def __init__(self, data: bytes | bytearray, max_values: int) -> None:
        self.values = 0
        self._data = data
        self._max_values = max_values
        self._at = 0

    def read(self, known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
        """The map's values under ``known`` keys, and the names of its other keys, which are not built.

        Integral floats become ints at any depth: some clients pack whole numbers above 65535 as float64.
        Raises Unreadable for what is no map with string keys, ends too early or too late, or is above a limit.
        """
        try:
            kind, count = self._head()
            if kind != "map":
                raise Unreadable(f"the message is {self._what(kind)}, expected a MessagePack map")
            taken, unknown = self._entries(count, 1, known)
        except (IndexError, StructError):
            raise Unreadable(f"the message ends after {len(self._data)} bytes in the middle of a value") from None
        if self._at < len(self._data):
            raise Unreadable(f"{len(self._data) - self._at} bytes follow the end of the map")
        return taken, unknown

    def _head(self) -> tuple[str, Any]:
        """Takes the beginning of a value: its kind and the value itself, its size or its count."""
        code = self._data[self._at]
        self._at += 1
        if code < 0x80:
            return "value", code
        if code >= 0xE0:
            return "value", code - 256
        if code < 0xC0:
            if code >= 0xA0:
                return "str", code & 31
            return ("map" if code < 0x90 else "list"), code & 15
        if code in _SIZED:
            kind, form = _SIZED[code]
            return kind, self._number(form)
        if code in _NUMBERS:
            return "value", self._number(_NUMBERS[code])
        if code in _FIXED_EXTENSIONS:
            return "ext", _FIXED_EXTENSIONS[code]
        if code == _NEVER_USED:
            raise Unreadable("byte 0xc1, which MessagePack does not have")
        return "value", None if code == _NIL else code == _TRUE

    def _what(self, kind: str) -> str:
        """What the message is whose beginning was taken and is no map."""
        if kind == "ext" and self._at < len(self._data):
            return str(_extension(self._number(_NUMBERS[0xD0])))
        if kind == "value" and 0x40 <= self._data[0] < 0x80 and len(self._data) > 1:
            return "a record of msgpackr without its keys (pack with useRecords false)"
        return _KINDS[kind]

    def _number(self, form: Struct) -> Any:
        (number,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return number

    def _value(self, depth: int, keep: bool) -> Any:
        """The next value, inside ``depth`` containers; None, with nothing built, unless ``keep``."""
        kind, given = self._head()
        if kind == "value":
            self._count(1)
            if isinstance(given, float) and given.is_integer() and _WHOLE[0] <= given < _WHOLE[1]:
                return int(given)
            return given
        if kind == "list":
            return self._items(given, depth + 1, keep)
        if kind == "map":
            return self._entries(given, depth + 1, None if keep else ())[0]
        self._count(1)
        code = self._number(_NUMBERS[0xD0]) if kind == "ext" else 0
        start, self._at = self._at, self._at + given
        if self._at > len(self._data):
            raise IndexError
        if not keep:
            return None
        if kind == "ext":
            is_undefined = given == 1 and (code, bytes(self._data[start : self._at])) == _UNDEFINED
            return None if is_undefined else _extension(code)
        data = self._bytes(start)
        if kind == "bin":
            return data
        try:
            return data.decode()
        except UnicodeDecodeError:
            return Unusable(f"a string of {given} bytes that is not UTF-8 (send text as UTF-8, other bytes as bin)")

    def _bytes(self, start: int) -> bytes:
        """From ``start`` to here. Large ones in pieces, between which other threads run."""
        view = memoryview(self._data)
        return b"".join(
            [bytes(view[at : min(at + _COPY_BYTES, self._at)]) for at in range(start, self._at, _COPY_BYTES)]
        )

    def _items(self, count: int, depth: int, keep: bool) -> list[Any]:
        self._enter(count, depth)
        items: list[Any] = []
        for index in range(count):
            try:
                item = self._value(depth, keep)
            except Unreadable as error:
                error.path.insert(0, index)
                raise
            if keep:
                items.append(item)
        return items

    def _entries(self, count: int, depth: int, known: Collection[str] | None) -> tuple[dict[str, Any], list[str]]:
        """The entries of a map under ``known`` keys, all if None, and the names of the others.

        Keys that are no strings are as unknown as others. A bin key is one that a client took for a string.
        """
        self._enter(2 * count, depth)
        taken: dict[str, Any] = {}
        unknown: list[str] = []
        for _ in range(count):
            is_skipped = known is not None and not known
            key = self._value(depth, keep=not is_skipped)
            if isinstance(key, bytes | Unusable):
                what = f"{key[:40]!r} (bin)" if isinstance(key, bytes) else key
                raise Unreadable(f"a key is {what}, keys must be strings")
            keep = isinstance(key, str) and (known is None or key in known)
            try:
                value = self._value(depth, keep)
            except Unreadable as error:
                error.path.insert(0, key if isinstance(key, str) else "?")
                raise
            if keep:
                taken[key] = value
            elif not is_skipped:
                unknown.append(str(key))
        return taken, unknown

    def _enter(self, count: int, depth: int) -> None:
        """Checks a container that holds ``count`` values before any of them is read."""
        if depth > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} deep")
        self._count(1)
        if self.values + count > self._max_values:
            raise Unreadable(f"too many values: a list or map with {count} of them, at most {self._max_values} in all")

    def _count(self, values: int) -> None:
        self.values += values
        if self.values > self._max_values:
            raise Unreadable(f"too many values, at most {self._max_values} in all")


def _extension(code: int) -> Unusable:
    hint = f"{_EXTENSIONS[code]}; " if code in _EXTENSIONS else ""
    return Unusable(f"a MessagePack extension of type {code} ({hint}send the bytes of a picture as bin)")
