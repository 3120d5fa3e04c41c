"""A snapshot of a session as a file: safetensors, with JSON texts beside the tensors. No torch, no pickle.

``world`` is the engine's part of the JSON, ``about`` the server's. The tensors are the engine's, but for the first
frame of the session.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from lingbot_rt.errors import InvalidInit

FORMAT = "lingbot_rt world 1"

FIRST_FRAME = "first_frame"
"""Name of the tensor uint8 [H, W, 3] with the session's first frame."""

MAX_HEADER_BYTES = 16 * 2**20
"""Most bytes of the texts and of the table of tensors together."""

MAX_TENSORS = 20_000
MAX_TEXT_VALUES = 500_000
"""Most items, keys and containers of a text."""

_FIELD = "resume"


@dataclass(frozen=True, slots=True)
class WorldFile:
    """What the file says without its large tensors."""

    about: str
    world: dict[str, Any]
    first_frame: npt.NDArray[np.uint8]  # [H, W, 3]

    @property
    def chunk_index(self) -> int:
        """The chunk that comes next."""
        return int(self.world["chunk_index"])


def read_world(data: bytes) -> WorldFile:
    """Raises InvalidInit with the field ``resume`` for bytes that are no such file, or only a part of one."""
    _require_small(data)
    try:
        tensors = dict(safetensors.deserialize(data))
        metadata = header_of(data)
        if metadata.get("format") != FORMAT:
            raise _refused(f"its format is {str(metadata.get('format'))[:60]!r}, expected {FORMAT!r}")
        frame = tensors[FIRST_FRAME]
        pixels = np.frombuffer(bytes(frame["data"]), np.uint8).reshape(frame["shape"])
        if frame["dtype"] != "U8" or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise _refused(f"{FIRST_FRAME} is {frame['dtype']} {list(pixels.shape)}, expected U8 [height, width, 3]")
        world = json.loads(metadata["world"])
        file = WorldFile(metadata["about"], world, pixels)
        if file.chunk_index < 0 or not isinstance(world["model"], dict):
            raise ValueError("chunk_index and model")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _refused(f"damaged, incomplete or something else ({type(error).__name__})") from None
    return file


def _require_small(data: bytes) -> None:
    """Checked before anything is built: a stranger chooses the bytes."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + min(length, MAX_HEADER_BYTES)]
    if length > MAX_HEADER_BYTES or header.count(b'"data_offsets"') > MAX_TENSORS:
        raise _refused(f"its header has {length} bytes, expected at most {MAX_HEADER_BYTES}, and {MAX_TENSORS} tensors")
    if sum(header.count(sign) for sign in (b",", b"[", b"{")) > MAX_TEXT_VALUES:
        raise _refused(f"its header has more than {MAX_TEXT_VALUES} values")


def header_of(data: bytes) -> dict[str, str]:
    """The texts beside the tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def _refused(problem: str) -> InvalidInit:
    return InvalidInit(f"the snapshot cannot be read: {problem}", field=_FIELD)
