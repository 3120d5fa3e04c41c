"""A PPM, PGM or PBM, written anew in the form that decoders read fast: without comments, 8 bits, or grey of 16 bits."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

_SPACE = rb"(?:\s|#[^\r\n]*+[\r\n])++"
_HEADER = re.compile(rb"P([1-6])" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})")
_MAXIMUM = re.compile(_SPACE + rb"(\d{1,5})")
_COMMENT = re.compile(rb"#[^\r\n]*+")

_PLAIN_BITS, _PLAIN_GREY, _PLAIN_COLOURS, _BITS, _GREY, _COLOURS = range(1, 7)


def read_header(data: bytes) -> tuple[int, int, int, int, int]:
    """Kind (1 to 6), width, height, largest value, and where the pixels begin. Raises ValueError."""
    found = _HEADER.match(data)
    if found is None:
        raise ValueError("no header")
    kind, width, height = (int(text) for text in found.groups())
    maximum, end = 1, found.end()
    if kind not in (_PLAIN_BITS, _BITS):
        last = _MAXIMUM.match(data, end)
        if last is None or not 0 < int(last[1]) < 65536:
            raise ValueError("no largest value")
        maximum, end = int(last[1]), last.end()
    return kind, width, height, maximum, end + 1  # one white space, then the pixels


def rewrite(data: bytes) -> bytes:
    """The file in the fast form. Raises ValueError if it is cut off. The caller has checked the size."""
    kind, width, height, maximum, begin = read_header(data)
    body = data[begin:]
    if kind == _BITS:
        return b"P4\n%d %d\n%s" % (width, height, body)
    is_grey = kind not in (_PLAIN_COLOURS, _COLOURS)
    count = width * height * (1 if is_grey else 3)
    if kind in (_GREY, _COLOURS):
        values = np.frombuffer(body, np.uint8 if maximum < 256 else ">u2", count)
    else:
        values = _plain(body, count, kind)
    if kind == _PLAIN_BITS:
        values = 1 - values  # here 1 is black
    largest = 65535 if is_grey and maximum > 255 else 255
    kept = f"P{_GREY if is_grey else _COLOURS}\n{width} {height}\n{largest}\n".encode()
    if maximum == largest:
        return kept + (body if kind in (_GREY, _COLOURS) else _packed(values, largest))
    # A table: there are few values, and many pixels.
    table = np.minimum(np.rint(np.arange(65536) / maximum * largest), largest)
    return kept + _packed(table[values], largest)


def _plain(body: bytes, count: int, kind: int) -> npt.NDArray[np.uint16]:
    text = _COMMENT.sub(b" ", body)
    if kind == _PLAIN_BITS:
        bits = text.translate(None, b" \t\r\n\x0b\x0c")[:count]
        if len(bits) < count or bits.strip(b"01"):
            raise ValueError("cut off")
        return (np.frombuffer(bits, np.uint8) - ord("0")).astype(np.uint16)
    words = text.split(None, count)[:count]
    if len(words) < count:
        raise ValueError("cut off")
    return np.array(words, "S5").astype(np.uint16)


def _packed(values: npt.NDArray[np.generic], largest: int) -> bytes:
    return values.astype(np.uint8 if largest == 255 else ">u2").tobytes()
