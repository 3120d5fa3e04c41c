"""Values of clients in error messages: one short line each, however large or deep the value is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from lingbot_rt.session.message_reader import Unusable

MAX_SHOWN = 80
"""Most characters of a value."""

_MAX_ITEMS_SHOWN = 4


def shown(value: object, depth: int = 2) -> str:
    """``value`` for an error message: one line of at most 80 characters, without the bytes of pictures.

    Clients choose the value, so time and stack are bounded: long values are cut, and so is what is nested deeper than
    ``depth``.
    """
    match value:
        case bytes():
            return f"{len(value)} bytes (bin)"
        case Unusable():
            return str(value)
        case str():
            text = repr(value[:MAX_SHOWN])
        case None | bool() | int() | float():
            text = repr(value)
        case list() | tuple():
            text = f"[{_items((shown(item, depth - 1) for item in value), len(value), depth)}]"
        case dict():
            pairs = (f"{shown(key, 0)}: {shown(item, depth - 1)}" for key, item in value.items())
            text = f"{{{_items(pairs, len(value), depth)}}}"
        case _:
            text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _items(items: Iterator[str], count: int, depth: int) -> str:
    """The first items of a list or map that has ``count``; none of them if ``depth`` is 0."""
    if depth == 0 and count:
        return "..."
    rest = ["..."] if count > _MAX_ITEMS_SHOWN else []
    return ", ".join([*islice(items, _MAX_ITEMS_SHOWN), *rest])
