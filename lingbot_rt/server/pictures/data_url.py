"""``data:`` URLs, read as browsers read them: the URL standard, the Fetch standard and its forgiving base64.

Time and memory are linear: a client chooses the length and every byte.
"""

from __future__ import annotations

import base64
import re

import numpy as np

from lingbot_rt.errors import InvalidFirstFrame
from lingbot_rt.session.messages import shown

_SPACE = b"\t\n\x0c\r "
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BLOCK_BYTES = 2**20

_DIGITS = np.full(256, 255, np.uint8)
"""The value of each hexadecimal digit; 255 for other bytes."""
for _value, _letters in enumerate(zip(b"0123456789abcdef", b"0123456789ABCDEF", strict=True)):
    _DIGITS[list(_letters)] = _value


def read_data_url(url: str) -> bytes:
    """The bytes that a ``data:`` URL holds. Its media type is ignored. Raises InvalidFirstFrame."""
    for letter in "\t\n\r":
        url = url.replace(letter, "")
    head, comma, body = url.partition(",")
    if not comma:
        raise InvalidFirstFrame(f"the data: URL {shown(url[:60])} has no comma, expected data:image/png;base64,...")
    content = percent_decoded(body.partition("#")[0].encode())
    if re.search(r"; *base64\s*$", head, re.IGNORECASE):
        return forgiving_base64(content)
    return content


def forgiving_base64(text: bytes) -> bytes:
    """Base64 with or without padding and white space. Raises InvalidFirstFrame."""
    letters = text.translate(None, _SPACE)
    if len(letters) % 4 == 0:
        letters = letters[:-2] + letters[-2:].rstrip(b"=") if letters.endswith(b"=") else letters
    others = letters.translate(None, _ALPHABET)
    if others:
        place = text.index(others[:1]) + 1
        raise InvalidFirstFrame(
            f"the data: URL's base64 has {shown(chr(others[0]))} at place {place}, expected letters, digits, + and /"
        )
    if len(letters) % 4 == 1:
        raise InvalidFirstFrame(
            f"the data: URL's base64 is cut off: {len(letters)} letters, one more than a multiple of 4"
        )
    return base64.b64decode(letters + b"=" * (-len(letters) % 4))


def percent_decoded(text: bytes) -> bytes:
    """``%41`` -> ``A``; a sign without two hexadecimal digits stays."""
    if b"%" not in text:
        return text
    parts, start = [], 0
    while start < len(text):
        # Two more bytes than a block, so that an escape at its end is whole.
        block = np.frombuffer(text, np.uint8, min(_BLOCK_BYTES + 2, len(text) - start), start)
        digits = _DIGITS[block]
        at = np.flatnonzero((block[:-2] == ord("%")) & (digits[1:-1] < 16) & (digits[2:] < 16))
        decoded, kept = block.copy(), np.ones(len(block), bool)
        decoded[at] = digits[at + 1] * 16 + digits[at + 2]
        kept[at + 1] = kept[at + 2] = False
        end = len(block) if start + len(block) == len(text) else _BLOCK_BYTES
        if len(at) and at[-1] + 3 > end:
            end = int(at[-1]) + 3
        parts.append(decoded[:end][kept[:end]].tobytes())
        start += end
    return b"".join(parts)
