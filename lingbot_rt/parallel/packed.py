"""Commands between ranks as MessagePack: ``[name of its class, fields]``. Reading one runs no code of the sender."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np


def pack(command: Any) -> bytes:
    """A dataclass of numbers, text, paths, arrays and dataclasses."""
    return msgspec.msgpack.encode([type(command).__name__, command], enc_hook=_encoded)


def unpack(packed: bytes, kinds: tuple[type, ...]) -> Any:
    """What ``pack`` made, if it is one of ``kinds``. Raises ValueError for anything else."""
    name, fields = msgspec.msgpack.decode(packed, type=tuple[str, msgspec.Raw])
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if kind is None:
        raise ValueError(f"a command {name}, expected one of {', '.join(kind.__name__ for kind in kinds)}")
    return msgspec.msgpack.decode(fields, type=kind, dec_hook=_decoded)


def _encoded(value: object) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes()]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not cross ranks")


def _decoded(kind: Any, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    if typing.get_origin(kind) is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(bytearray(data), dtype).reshape(shape)  # bytes would make it read-only
    raise TypeError(f"{kind} does not cross ranks")
