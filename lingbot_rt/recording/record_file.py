"""The format of a session record: a folder with ``record.jsonl``, the first frame as PNG, and the last frame of each
chunk as lossless WebP, which encodes in a third of a PNG's time.

``record.jsonl`` has one ``SessionLine``, one ``ChunkLine`` per finished chunk, and an ``EndLine`` if the recorder was
closed. Each line is flushed once written, so a crash loses at most the chunk being written. Reading skips a last line
that was cut off.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.errors import RecordError

RECORD_NAME = "record.jsonl"
FORMAT = 1


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


def encode_last_frame(frame: npt.NDArray[np.uint8]) -> bytes:
    """A raw frame [H, W, 3] as lossless WebP."""
    encoded = io.BytesIO()
    Image.fromarray(frame).save(encoded, "WEBP", lossless=True, quality=0, method=0)
    return encoded.getvalue()


def read_last_frame(folder: Path, chunk: int) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]. Raises RecordError if it is missing or damaged."""
    path = last_frame_path(folder, chunk)
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise RecordError(f"{path}: {error}") from None


def last_frame_path(folder: Path, chunk: int) -> Path:
    """File of a chunk's last raw frame."""
    return folder / f"chunk{chunk:05d}.webp"


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
