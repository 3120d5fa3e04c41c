"""The messages that clients get, as bytes. ``messages.py`` has those that clients send.

Existing clients cannot read negative integers, uint64, int8..64, str32, map32 or ext types. No message here has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from lingbot_rt.errors import InvalidEvent, LingbotError
from lingbot_rt.session.plan import Rewound

AckState = Literal["received", "applied", "dropped"]
"""What a ``control_ack`` says: each event is received, and then applied or dropped."""

INLINE_PAYLOAD_LIMIT = 65536
"""A payload below this many bytes travels inside its header map. A larger one is a message of its own."""

MAX_WORLD_BYTES = 2**32 - 1
"""Largest saved world that a message can carry."""

_MAX_UINT32 = 2**32 - 1
_MAX_TEXT = 2000
_ENCODER = msgspec.msgpack.Encoder()


def _count(value: int) -> int | float:
    """A count as clients can read it: never negative, and float64 above 32 bits."""
    return max(value, 0) if value <= _MAX_UINT32 else float(value)


def _ms(value: float) -> int | float:
    """Milliseconds, rounded half up, never negative."""
    return _count(int(value + 0.5))


def _line(text: str) -> str:
    return " ".join(text.split())[:_MAX_TEXT]


def error_message(error: LingbotError) -> bytes:
    """``content`` is one line of at most 2000 characters; ``field`` and ``event_id`` are there only if known."""
    message: dict[str, Any] = {"type": "error", "content": _line(error.wire_content), "code": error.code}
    if error.field is not None:
        message["field"] = error.field[:_MAX_TEXT]
    if error.event_id is not None:
        message["event_id"] = _count(error.event_id)
    return _ENCODER.encode(message)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The payload of one frame batch and what its header says about it."""

    content_type: str
    encoding: str  # "raw", "delta-gzip", "webp", "jpeg"
    num_frames: int
    payload: bytes
    payload_lengths: tuple[int, ...] | None  # bytes of each picture; None for raw and delta-gzip
    width: int  # of the frames as sent, pixels
    height: int
    source_width: int  # of the frames as generated
    source_height: int
    raw_size: int  # bytes of the frames before any encoding
    delta_reference: str | None = None  # "previous-frame": XORed with the last frame of the batch before


def batch_messages(
    batch: EncodedBatch,
    *,
    request_id: str,
    chunk_index: int,
    frame_batch_index: int,
    num_frame_batches: int,
    event_id: int | None,
) -> tuple[bytes, ...]:
    """One batch as one ``frame_batch`` message, or as two: a ``frame_batch_header`` and, right after it, the payload.

    delta-gzip batches and payloads of ``INLINE_PAYLOAD_LIMIT`` bytes or more come as two.
    """
    is_delta = batch.encoding == "delta-gzip"
    inline = len(batch.payload) < INLINE_PAYLOAD_LIMIT and not is_delta
    header: dict[str, Any] = {
        "type": "frame_batch" if inline else "frame_batch_header",
        "request_id": request_id,
        "chunk_index": _count(chunk_index),
        "content_type": batch.content_type,
        "num_frames": batch.num_frames,
        "total_size": len(batch.payload),
        "frame_batch_index": frame_batch_index,
        "num_frame_batches": num_frame_batches,
        "is_final_frame_batch": frame_batch_index == num_frame_batches - 1,
    }
    if event_id is not None:
        header["event_id"] = _count(event_id)
    header |= {
        "format": "rgb24" if batch.payload_lengths is None else batch.encoding,
        "width": batch.width,
        "height": batch.height,
        "channels": 3,
        "bytes_per_frame": batch.source_width * batch.source_height * 3,
    }
    if batch.payload_lengths is None:
        header |= {"raw_size": batch.raw_size, "encoding": batch.encoding}
        if batch.delta_reference is not None:
            header["delta_reference"] = batch.delta_reference
    else:
        header |= {
            "encoding": batch.encoding,
            "source_width": batch.source_width,
            "source_height": batch.source_height,
            "preview_width": batch.width,
            "preview_height": batch.height,
            "payload_lengths": batch.payload_lengths,
        }
    if inline:
        header["payload"] = batch.payload
        return (_ENCODER.encode(header),)
    return _ENCODER.encode(header), batch.payload


@dataclass(frozen=True, slots=True)
class KeptChunks:
    """What a session can go back to."""

    kept_from: int | None  # the first chunk; None: the server keeps none
    branch: int  # that the session is in


@dataclass(frozen=True, slots=True)
class Share:
    """What a chunk had of an engine that several sessions share."""

    sessions: int  # that have it
    wait_ms: float  # for its turn


@dataclass(slots=True)
class ChunkStats:
    """The times and sizes of one chunk. Filled while the chunk is made and sent; sent itself after the last frame."""

    session_id: str
    request_id: str
    chunk_index: int
    event_id: int | None = None
    request_prepare_ms: float = 0.0  # sampling the conditions and computing the camera poses
    scheduler_forward_ms: float = 0.0  # the whole engine
    pace_wait_ms: float = 0.0  # waiting because of realtime_output_pacing
    header_write_ms: float = 0.0  # writing headers, and payloads that are inline, to the socket
    raw_payload_build_ms: float = 0.0  # encoding
    raw_write_ms: float = 0.0  # writing payload messages to the socket
    chunk_total_ms: float = 0.0  # from the last frame of the previous chunk, or the start, to the last frame
    num_batches: int = 0
    num_frames: int = 0
    raw_bytes: int = 0
    ws_payload_bytes: int = 0
    content_type: str = ""
    # From here on: what the reference does not send.
    queue_wait_ms: float = 0.0  # the engine was free, but a chunk before the last one was still unsent
    dit_ms: float = 0.0
    vae_ms: float = 0.0
    event_latency_ms: float | None = None  # from receiving the event to sending the first frame that carries it
    window_frames: int = 0  # latent frames that the last forward attended to
    postprocess_ms: Mapping[str, float] = field(default_factory=dict)  # upscale_ms and interpolate_ms, if on
    stages: Mapping[str, float] | None = None  # ms of each engine stage; only with `profile`
    kept: KeptChunks | None = None  # only with the extension `history`
    share: Share | None = None  # only with the extension `session`, where several sessions share the engine


def stats_fields(stats: ChunkStats) -> dict[str, Any]:
    """The map of a ``chunk_stats`` message. The reference's keys come first, in its order."""
    message: dict[str, Any] = {
        "type": "chunk_stats",
        "session_id": stats.session_id,
        "request_id": stats.request_id,
        "chunk_index": _count(stats.chunk_index),
        "event_id": None if stats.event_id is None else _count(stats.event_id),
        "request_prepare_ms": _ms(stats.request_prepare_ms),
        "scheduler_forward_ms": _ms(stats.scheduler_forward_ms),
        "pace_wait_ms": _ms(stats.pace_wait_ms),
        "header_write_ms": _ms(stats.header_write_ms),
        "raw_payload_build_ms": _ms(stats.raw_payload_build_ms),
        "raw_write_ms": _ms(stats.raw_write_ms),
        "ws_write_ms": _ms(stats.header_write_ms + stats.raw_write_ms),
        # Clients divide by it.
        "chunk_total_ms": max(_ms(stats.chunk_total_ms), 1),
        "num_batches": stats.num_batches,
        "num_frames": stats.num_frames,
        "raw_bytes": _count(stats.raw_bytes),
        "ws_payload_bytes": _count(stats.ws_payload_bytes),
        "content_type": stats.content_type,
        "queue_wait_ms": _ms(stats.queue_wait_ms),
        "dit_ms": _ms(stats.dit_ms),
        "vae_ms": _ms(stats.vae_ms),
        "encode_ms": _ms(stats.raw_payload_build_ms),
        "event_latency_ms": None if stats.event_latency_ms is None else _ms(stats.event_latency_ms),
        "window_frames": _count(stats.window_frames),
    }
    message |= {name: _ms(ms) for name, ms in stats.postprocess_ms.items()}
    if stats.kept is not None:
        kept_from = stats.kept.kept_from
        message |= {"kept_from": None if kept_from is None else _count(kept_from), "branch": _count(stats.kept.branch)}
    if stats.share is not None:
        message |= {"sessions": _count(stats.share.sessions), "turn_wait_ms": _ms(stats.share.wait_ms)}
    if stats.stages is not None:
        message["stages"] = {name: max(round(ms, 3), 0.0) for name, ms in stats.stages.items()}
    return message


def stats_message(stats: ChunkStats) -> bytes:
    return _ENCODER.encode(stats_fields(stats))


@dataclass(frozen=True, slots=True)
class ResumeOffer:
    """How a client comes back after its line was lost."""

    token: str
    limit_s: float  # how long the session is kept for it


def session_message(
    session_id: str,
    capabilities: Mapping[str, Any],
    offer: ResumeOffer | None = None,
    resumed: Rewound | None = None,
) -> bytes:
    """Extension ``session``: sent once, when the session is open. ``resumed``: it goes on, from where that says."""
    message: dict[str, Any] = {"type": "session", "session_id": session_id, "capabilities": dict(capabilities)}
    if offer is not None:
        message |= {"resume_token": offer.token, "resume_s": offer.limit_s}
    if resumed is not None:
        message |= {"resumed": True} | _place(resumed)
    return _ENCODER.encode(message)


def rewound_message(place: Rewound, event_id: int | None) -> bytes:
    """Extension ``history``: the next frames are those of ``place.chunk_index``."""
    message = {"type": "rewound"} | _place(place)
    if event_id is not None:
        message["event_id"] = _count(event_id)
    return _ENCODER.encode(message)


def world_message(data: bytes, chunk_index: int, event_id: int | None) -> bytes:
    """Extension ``history``: the saved world ``data``, from which chunk ``chunk_index`` comes next.

    Raises InvalidEvent when it is larger than a message can be.
    """
    if len(data) > MAX_WORLD_BYTES:
        raise InvalidEvent(f"the world has {len(data)} bytes, a message at most {MAX_WORLD_BYTES}", field="save")
    message: dict[str, Any] = {"type": "world", "chunk_index": _count(chunk_index)}
    if event_id is not None:
        message["event_id"] = _count(event_id)
    return _ENCODER.encode(message | {"payload": data})


def _place(place: Rewound) -> dict[str, Any]:
    return {"chunk_index": _count(place.chunk_index), "branch": _count(place.branch), "exact": place.exact}


def queue_message(position: int, waited_ms: float) -> bytes:
    """Extension ``queue``: the place in line, where 1 is next and 0 is the end of it, and the time so far."""
    return _ENCODER.encode({"type": "queue", "position": _count(position), "waited_ms": _ms(waited_ms)})


def warming_message(session_id: str, size: str, expected_ms: float | None) -> bytes:
    """Extension ``warming``: the session opens once code is compiled for its ``size``. None: no telling how long."""
    expected = {} if expected_ms is None else {"expected_ms": _ms(expected_ms)}
    return _ENCODER.encode({"type": "warming", "session_id": session_id, "size": size} | expected)


def control_ack_message(event_id: int | None, state: AckState, chunk_index: int | None) -> bytes:
    """Extension ``control_ack``: an event was received, applies from chunk ``chunk_index`` on, or was dropped."""
    message: dict[str, Any] = {"type": "control_ack", "state": state}
    if event_id is not None:
        message["event_id"] = _count(event_id)
    if chunk_index is not None:
        message["chunk_index"] = _count(chunk_index)
    return _ENCODER.encode(message)


def heartbeat_message(uptime_ms: float, state: str, chunk_index: int) -> bytes:
    """Extension ``heartbeat``: the session is alive even when no frames come. ``state``: running, paused, warming."""
    return _ENCODER.encode(
        {"type": "heartbeat", "uptime_ms": _ms(uptime_ms), "state": state, "chunk_index": _count(chunk_index)}
    )


def warning_message(content: str, field: str, event_id: int | None) -> bytes:
    """Extension ``warning``: what the client sent in ``field`` was taken, but not as it stands."""
    message: dict[str, Any] = {"type": "warning", "content": _line(content), "field": field[:_MAX_TEXT]}
    if event_id is not None:
        message["event_id"] = _count(event_id)
    return _ENCODER.encode(message)
