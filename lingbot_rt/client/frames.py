"""Decodes received frame batches into pixel frames, for all four transports.

H x W are the pixels of a frame as it was sent; a preview may be smaller than the session's size.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.errors import ProtocolError
from lingbot_rt.session.messages import DELTA_GZIP_TYPE, ENCODED_TYPES, RAW_TYPE, shown

Pixels = npt.NDArray[np.uint8]

_GZIP_WINDOW_BITS = 31


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One pixel frame of the stream."""

    pixels: Pixels  # [H, W, 3] RGB, read-only
    index: int  # 0, 1, 2 ... over the whole session
    chunk_index: int
    event_id: int | None  # newest event whose effect is in this chunk


class FrameDecoder:
    """Decodes one session's batches in order. Keeps the last frame, because the next delta may refer to it."""

    def __init__(self) -> None:
        self._reference: Pixels | None = None
        self._next_index = 0

    def decode(self, header: dict[str, Any], payload: bytes) -> list[Frame]:
        """Raises ProtocolError if the payload does not fit its header."""
        if not isinstance(payload, bytes):
            raise ProtocolError(f"a frame batch has a payload of type {type(payload).__name__}, expected bytes")
        pictures = list(self._pictures(header, payload))
        chunk_index = _whole(header, "chunk_index")
        event_id = None if header.get("event_id") is None else _whole(header, "event_id")
        frames = [Frame(pixels, self._next_index + i, chunk_index, event_id) for i, pixels in enumerate(pictures)]
        self._next_index += len(frames)
        return frames

    def forget_reference(self) -> None:
        """The next batch comes on a new line, whose first delta stands alone."""
        self._reference = None

    def _pictures(self, header: dict[str, Any], payload: bytes) -> Iterator[Pixels]:
        content_type = header.get("content_type")
        if content_type in ENCODED_TYPES.values():
            return _encoded_pictures(payload, header.get("payload_lengths"), str(content_type))
        if content_type not in (RAW_TYPE, DELTA_GZIP_TYPE):
            raise ProtocolError(f"a frame header has the content_type {shown(content_type)}, which is unknown")
        shape = (_whole(header, "num_frames"), _whole(header, "height"), _whole(header, "width"), 3)
        if content_type == RAW_TYPE:
            return iter(_as_frames(payload, shape))
        return iter(self._undo_deltas(header, _inflate(payload, math.prod(shape)), shape))

    def _undo_deltas(self, header: dict[str, Any], inflated: bytes, shape: tuple[int, ...]) -> Pixels:
        """Undoes the XOR of each frame with the one before it, which may be the last frame of the message before."""
        frames: Pixels = np.bitwise_xor.accumulate(_as_frames(inflated, shape), axis=0)
        if header.get("delta_reference") == "previous-frame":
            if self._reference is None or self._reference.shape != shape[1:]:
                raise ProtocolError("a delta batch refers to a frame that was not received")
            frames = frames ^ self._reference
        if len(frames):
            self._reference = frames[-1]
        return frames


def _whole(header: dict[str, Any], name: str) -> int:
    """A field of a frame header that counts something."""
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ProtocolError(f"a frame header has the {name} {shown(value)}, expected a whole number")
    return value


def _as_frames(data: bytes, shape: tuple[int, ...]) -> Pixels:
    if len(data) != math.prod(shape):
        raise ProtocolError(f"{len(data)} bytes are not {shape[0]} frames of {shape[2]}x{shape[1]}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _inflate(payload: bytes, expected: int) -> bytes:
    """Stops one byte after ``expected``, so that a payload can't take more memory than its header states."""
    try:
        return zlib.decompressobj(_GZIP_WINDOW_BITS).decompress(payload, expected + 1)
    except (zlib.error, OverflowError):
        raise ProtocolError(f"a delta-gzip payload of {len(payload)} bytes is damaged") from None


def _encoded_pictures(payload: bytes, lengths: Any, content_type: str) -> Iterator[Pixels]:
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise ProtocolError(f"a frame header has the payload_lengths {shown(lengths)}, expected whole numbers")
    if sum(lengths) != len(payload):
        raise ProtocolError(f"payload_lengths add up to {sum(lengths)}, the payload has {len(payload)} bytes")
    start = 0
    for number, length in enumerate(lengths):
        try:
            with Image.open(io.BytesIO(payload[start : start + length])) as picture:
                yield np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise ProtocolError(f"picture {number} of a batch, {length} bytes, is no valid {content_type}") from None
        start += length
