"""The format of a session record: a folder with ``record.jsonl``, the first frame as PNG, and the last frame of each
chunk as lossless WebP, which encodes in a third of a PNG's time, or as PNG where it is too large for WebP.

``record.jsonl`` has one ``SessionLine``, one ``ChunkLine`` per finished chunk, and an ``EndLine`` if the recorder was
closed. Each line is flushed once written, so a crash loses at most the chunk being written. Reading skips a last line
that was cut off.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.errors import RecordError
from lingbot_rt.session.messages import shown
from lingbot_rt.session.settings import MAX_PICTURE_SIDE

RECORD_NAME = "record.jsonl"
FORMAT = 1

MAX_LEFT_OUT = 100
"""Most places that a record names as left out."""


class SessionLine(msgspec.Struct, tag="session", tag_field="line", frozen=True):
    """How the session began."""

    format: int
    session_id: str
    started_at: str  # ISO 8601, UTC
    init: dict[str, Any]  # the client's init without its first frame
    first_frame: str  # its file in the same folder, named after the SHA-256 of its bytes
    seed: int
    model: str
    model_path: str  # the folder it was loaded from; for a model of the hub it names the revision
    device: str
    dtype: str
    versions: dict[str, str]  # of the packages that the frames depend on
    left_out: list[str] = []  # places in the init, and what stood there, that JSON cannot hold


class RecordedEvent(msgspec.Struct, frozen=True):
    kind: str
    payload: Any
    event_id: int | None = None


class ChunkLine(msgspec.Struct, tag="chunk", tag_field="line", frozen=True):
    """One finished chunk."""

    index: int
    events: list[RecordedEvent]  # events that took effect in this chunk, in order of arrival
    event_id: int | None
    hashes: list[str]  # ``frame_hash`` of every raw frame
    stats: dict[str, Any]  # its chunk_stats


class EndLine(msgspec.Struct, tag="end", tag_field="line", frozen=True):
    reason: str


RecordLine = SessionLine | ChunkLine | EndLine
_decoder = msgspec.json.Decoder(RecordLine)
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A record as it was read."""

    folder: Path
    session: SessionLine
    chunks: list[ChunkLine]
    end: EndLine | None  # None: the process died, or the record reached its size limit

    @property
    def first_frame(self) -> bytes:
        """The bytes of the first frame's file. Raises RecordError if it is missing."""
        try:
            return (self.folder / self.session.first_frame).read_bytes()
        except OSError as error:
            raise RecordError(f"{self.folder / self.session.first_frame}: {error.strerror}") from None

    @property
    def playback_fps(self) -> float:
        """Frames/s of the session's playback, interpolated frames included."""
        init = self.session.init
        rate = 2 ** init["frame_interpolation_exp"] if init["enable_frame_interpolation"] else 1
        return float(init["fps"] * rate)


def frame_hash(frame: npt.NDArray[np.uint8]) -> str:
    """The first 16 hex digits of the SHA-256 of a frame's raw RGB bytes."""
    return hashlib.sha256(np.ascontiguousarray(frame).data).hexdigest()[:16]


def encode_last_frame(frame: npt.NDArray[np.uint8]) -> tuple[str, bytes]:
    """A raw frame [H, W, 3] as the suffix and the bytes of a lossless picture file."""
    encoded = io.BytesIO()
    if max(frame.shape) > MAX_PICTURE_SIDE["webp"]:
        Image.fromarray(frame).save(encoded, "PNG", compress_level=1)
        return ".png", encoded.getvalue()
    Image.fromarray(frame).save(encoded, "WEBP", lossless=True, quality=0, method=0)
    return ".webp", encoded.getvalue()


def read_last_frame(folder: Path, chunk: int) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]. Raises RecordError if it is missing or damaged."""
    path = last_frame_path(folder, chunk)
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise RecordError(f"{path}: {error}") from None


def last_frame_path(folder: Path, chunk: int, suffix: str | None = None) -> Path:
    """File of a chunk's last raw frame; without ``suffix`` the one that is there."""
    paths = [folder / f"chunk{chunk:05d}{kind}" for kind in ([suffix] if suffix else [".webp", ".png"])]
    return next((path for path in paths if path.exists()), paths[0])


def keepable(value: Any, place: str, left_out: list[str]) -> Any:
    """``value`` without what JSON cannot give back. ``left_out`` gets the place of each such value and what it was.

    In a list null takes its place. ``left_out`` stops at ``MAX_LEFT_OUT`` places.
    """
    match value:
        case dict():
            kept = {}
            for key, item in value.items():
                name = key if isinstance(key, str) and key.isidentifier() and len(key) < 64 else shown(key)
                kept[str(key)] = keepable(item, f"{place}.{name}".removeprefix("."), left_out)
                if kept[str(key)] is None and item is not None:
                    del kept[str(key)]
            return kept
        case list() | tuple():
            return [keepable(item, f"{place}[{index}]", left_out) for index, item in enumerate(value)]
        case msgspec.Struct():
            return keepable(msgspec.structs.asdict(value), place, left_out)
        case None | bool():
            return value
        case int() if abs(value) < 2**63:
            return value
        case float() if math.isfinite(value):
            return value
        case str() if value.encode(errors="replace").decode() == value:  # no half of a surrogate pair
            return value
    if len(left_out) < MAX_LEFT_OUT:
        left_out.append(f"{place}: {shown(value)}")
    return None


def encode_line(line: RecordLine) -> bytes:
    return _encoder.encode(line) + b"\n"


def read_record(path: Path) -> SessionRecord:
    """Reads a record from its folder or its record.jsonl. Raises RecordError that names the wrong line."""
    folder = path.parent if path.name == RECORD_NAME else path
    try:
        raw = (folder / RECORD_NAME).read_bytes()
    except OSError as error:
        raise RecordError(f"{folder / RECORD_NAME}: {error.strerror}") from None
    lines = raw.split(b"\n")
    # Whatever follows the last line end was cut off while being written.
    decoded = [_decode(folder, number, line) for number, line in enumerate(lines[:-1], start=1)]
    if not decoded or not isinstance(decoded[0], SessionLine):
        raise RecordError(f"{folder / RECORD_NAME}: the first line is not a session line")
    if decoded[0].format != FORMAT:
        raise RecordError(f"{folder / RECORD_NAME}: format {decoded[0].format}, this version reads {FORMAT}")
    chunks = [line for line in decoded if isinstance(line, ChunkLine)]
    if [chunk.index for chunk in chunks] != list(range(len(chunks))):
        raise RecordError(f"{folder / RECORD_NAME}: chunks are not in order")
    end = decoded[-1]
    return SessionRecord(folder, decoded[0], chunks, end if isinstance(end, EndLine) else None)


def _decode(folder: Path, number: int, line: bytes) -> RecordLine:
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{folder / RECORD_NAME}: line {number}: {error}") from None
