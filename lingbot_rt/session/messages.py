"""The wire's messages: one decoder for what clients send, one encoder for what they get. Pure: bytes in, bytes out.

The types below are the specification of ``init`` and ``event``: each field carries its range and, in words, what is
expected, and both the check and the error message come from there. ``docs/wire.md`` is the same table for readers.

Existing clients read no negative integers, uint64, int8..64, str32, map32 or ext types, so nothing here sends them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lingbot_rt.config import OUTPUT_FORMATS, FormatName
from lingbot_rt.errors import InvalidEvent, InvalidInit, LingbotError, RequestError

log = logging.getLogger(__name__)

EXTENSIONS = ("session", "queue", "control_ack", "heartbeat", "pause", "pinned_events")
"""Names an init may list in ``protocol_extensions``; others are ignored."""

INLINE_PAYLOAD_LIMIT = 65536
"""A payload below this many bytes travels inside its header map, a larger one as a message of its own."""

MAX_UINT32 = 2**32 - 1
_MAX_TEXT = 2000
_SHOWN = 80


def one_of(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


_Text = Annotated[str, Meta(description="a string")]
_Flag = Annotated[bool, Meta(description="true or false")]


class PinnedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that stands in the init already: chunk ``chunk`` is the first to sample it, whatever the timing."""

    chunk: Annotated[int, Meta(ge=0, le=MAX_UINT32)]
    kind: str
    payload: Any = None
    event_id: Annotated[int, Meta(ge=0, le=2**53)] | None = None


class Init(msgspec.Struct, frozen=True, kw_only=True):
    """The first message of a session. A nil value counts as an absent key."""

    prompt: Annotated[
        str,
        Meta(min_length=1, max_length=8192, description="a sentence of 1 to 8192 characters that describes the world"),
    ]
    first_frame: Annotated[  # bytes | str, a union msgspec has not; `decode` holds it
        Any, Meta(description="the bytes of a picture, a data: URL, or a path or URL the server allows")
    ]
    model: _Text = ""
    size: Annotated[str, Meta(description="WIDTHxHEIGHT, for example 832x480")] = "832x480"
    fps: Annotated[float, Meta(ge=1, le=120, description="a number from 1 to 120")] = 16.0
    num_frames: Annotated[int, Meta(ge=1, le=81, description="a whole number from 1 to 81")] = 9
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="a whole number from 0 to 2^63-1")] = 42
    num_inference_steps: Annotated[int, Meta(ge=1, le=50, description="a whole number from 1 to 50")] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=30, description="a number from 0 to 30; 1 is no guidance")] = 1.0
    negative_prompt: Annotated[str, Meta(max_length=8192, description="a string of at most 8192 characters")] = ""
    max_chunks: Annotated[int, Meta(ge=1, le=MAX_UINT32, description="a whole number, at least 1")] | None = None
    realtime_causal_sink_size: (
        Annotated[int, Meta(ge=0, le=4096, description="a whole number of latent frames, 0 to 4096")] | None
    ) = None
    realtime_causal_kv_cache_num_frames: (
        Annotated[int, Meta(ge=1, le=4096, description="a whole number of latent frames, 1 to 4096")] | None
    ) = None
    realtime_output_format: Annotated[FormatName, Meta(description=one_of(OUTPUT_FORMATS))] | None = None
    output_compression: Annotated[int, Meta(ge=1, le=100, description="a whole number from 1 to 100")] | None = None
    realtime_preview_max_width: (
        Annotated[int, Meta(ge=0, le=8192, description="a whole number of pixels, 0 to 8192; 0 is none")] | None
    ) = None
    realtime_output_pacing: _Flag = False
    enable_upscaling: _Flag = False
    upscaling_scale: Annotated[int, Meta(ge=2, le=4, description="2, 3 or 4")] = 4
    upscaling_model_path: _Text | None = None
    enable_frame_interpolation: _Flag = False
    frame_interpolation_exp: Annotated[int, Meta(ge=1, le=3, description="1, 2 or 3")] = 1
    frame_interpolation_scale: Annotated[float, Meta(gt=0, le=8, description="a number above 0, at most 8")] = 1.0
    frame_interpolation_model_path: _Text | None = None
    condition_inputs: Annotated[dict[str, Any], Meta(description="a map with camera_actions")] | None = None
    enhance_prompt: Annotated[Literal[False], Meta(description="false: prompts are never rewritten")] = False
    profile: _Flag = False
    protocol_extensions: Annotated[tuple[str, ...], Meta(description="a list of extension names")] = ()
    pinned_events: Annotated[
        tuple[PinnedEvent, ...], Meta(max_length=4096, description="a list of maps with chunk, kind, payload, event_id")
    ] = ()
    record: _Flag = False


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Anything a client sends into a running session. ``controls.py`` looks inside ``payload``."""

    kind: Annotated[str, Meta(max_length=64, description="prompt, camera_actions or composite_input")]
    payload: Any = None
    event_id: Annotated[int, Meta(ge=0, le=2**53, description="a whole number from 0 to 2^53")] | None = None


_TYPES: dict[str, tuple[type[Init] | type[Event], type[RequestError]]] = {
    "init": (Init, InvalidInit),
    "event": (Event, InvalidEvent),
}
_DECODER = msgspec.msgpack.Decoder(dict[str, Any])
_ENCODER = msgspec.msgpack.Encoder()
_FIELD = re.compile(r"\$\.(\w+)")


def decode(data: bytes, refusal: type[RequestError] = InvalidInit) -> Init | Event:
    """One binary client message. Raises InvalidInit or InvalidEvent; no other exception whatever the bytes.

    ``refusal`` is raised for bytes that are neither.
    """
    try:
        raw = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError, TypeError) as error:
        raise refusal(f"the message is not a MessagePack map: {_one_line(error)}") from None
    tag = raw.pop("type", None)
    if not isinstance(tag, str) or tag not in _TYPES:
        raise refusal(f'{shown(tag)}, expected "init" or "event"', field="type")
    struct, refusal = _TYPES[tag]
    fields = struct.__struct_fields__
    known = {key: _whole(value) for key, value in raw.items() if key in fields and value is not None}
    if len(known) < len(raw):
        unknown = [key for key in raw if key not in fields]
        log.debug("%s message: %d unknown keys ignored: %s", tag, len(unknown), ", ".join(unknown[:10]))
    try:
        message = msgspec.convert(known, struct)
    except msgspec.ValidationError as error:
        raise _refused(struct, refusal, known, str(error)) from None
    if isinstance(message, Init) and not isinstance(message.first_frame, bytes | str):
        raise _refused(struct, refusal, known, "$.first_frame")
    return message


def _whole(value: Any) -> Any:
    """Some clients pack every integer outside -32..65535 as float64; a number field takes the integer just as well."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refused(
    struct: type[Init] | type[Event], refusal: type[RequestError], known: Mapping[str, Any], text: str
) -> RequestError:
    match = _FIELD.search(text)
    if match is None:  # "Object missing required field `prompt`"
        field = text.rpartition("field ")[2].strip("`")
        hint = " (empty strings count as missing)" if field == "prompt" else ""
        return refusal(f"missing, expected {expected(struct, field)}{hint}", field=field)
    field = match[1]
    return refusal(f"{shown(known[field])}, expected {expected(struct, field)}", field=field)


def expected(struct: type[Init] | type[Event], field: str) -> str:
    """What a field takes, in words."""
    kind = next(entry for entry in msgspec.inspect.type_info(struct).fields if entry.name == field).type  # type: ignore[attr-defined]
    options = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    described = (
        option.extra_json_schema for option in (*options, kind) if isinstance(option, msgspec.inspect.Metadata)
    )
    return next((schema["description"] for schema in described if schema), "another value")


def shown(value: object) -> str:
    """``value`` for an error message: short, on one line, without the bytes of pictures."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:_MAX_TEXT]


# --- server to client ---------------------------------------------------------------------------------------------


def wire_int(value: int) -> int | float:
    """A count as clients can read it: never negative, above 32 bits as float64."""
    return max(value, 0) if value <= MAX_UINT32 else float(value)


def wire_ms(value: float) -> int | float:
    """Milliseconds, rounded half up, never negative."""
    return wire_int(int(value + 0.5))


def error_message(error: LingbotError) -> bytes:
    message: dict[str, Any] = {"type": "error", "content": _one_line(error.wire_content), "code": error.code}
    if error.field is not None:
        message["field"] = error.field[:_MAX_TEXT]
    return _ENCODER.encode(message)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """One batch's payload and everything its header says about it."""

    content_type: str
    encoding: str  # "raw", "delta-gzip", "webp", "jpeg"
    num_frames: int
    payload: bytes
    payload_lengths: tuple[int, ...] | None  # of each encoded picture; None for raw kinds
    width: int  # as sent
    height: int
    source_width: int  # as generated
    source_height: int
    raw_size: int  # bytes of the frames before any encoding
    delta_reference: str | None = None  # "previous-frame": the first frame is XORed with the last one sent


def batch_messages(
    batch: EncodedBatch,
    *,
    request_id: str,
    chunk_index: int,
    frame_batch_index: int,
    num_frame_batches: int,
    event_id: int | None,
) -> tuple[bytes, ...]:
    """One batch as one ``frame_batch`` message, or as ``frame_batch_header`` and its payload, which belong together."""
    is_delta = batch.encoding == "delta-gzip"
    inline = len(batch.payload) < INLINE_PAYLOAD_LIMIT and not is_delta
    header: dict[str, Any] = {
        "type": "frame_batch" if inline else "frame_batch_header",
        "request_id": request_id,
        "chunk_index": wire_int(chunk_index),
        "content_type": batch.content_type,
        "num_frames": batch.num_frames,
        "total_size": len(batch.payload),
        "frame_batch_index": frame_batch_index,
        "num_frame_batches": num_frame_batches,
        "is_final_frame_batch": frame_batch_index == num_frame_batches - 1,
    }
    if event_id is not None:
        header["event_id"] = wire_int(event_id)
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


@dataclass(slots=True)
class ChunkStats:
    """One chunk's times and sizes; filled while the chunk passes through, sent after its last frame."""

    session_id: str
    request_id: str
    chunk_index: int
    event_id: int | None = None
    request_prepare_ms: float = 0.0  # sampling the conditions, walking the camera
    scheduler_forward_ms: float = 0.0  # the engine, whole
    pace_wait_ms: float = 0.0  # held back for realtime_output_pacing
    header_write_ms: float = 0.0  # socket, header maps (with their payload, when inline)
    raw_payload_build_ms: float = 0.0  # encoding
    raw_write_ms: float = 0.0  # socket, payload messages
    chunk_total_ms: float = 0.0  # wall time from the chunk before (or this one's beginning) to the last frame sent
    num_batches: int = 0
    num_frames: int = 0
    raw_bytes: int = 0
    ws_payload_bytes: int = 0
    content_type: str = ""
    # ours
    queue_wait_ms: float = 0.0  # waited for room in the outbox before it was planned
    dit_ms: float = 0.0
    vae_ms: float = 0.0
    event_latency_ms: float | None = None  # event received -> first frame carrying it sent
    window_frames: int = 0
    postprocess_ms: Mapping[str, float] = field(default_factory=dict)  # upscale_ms, interpolate_ms, of what is on
    stages: Mapping[str, float] | None = None  # with `profile`


def stats_fields(stats: ChunkStats) -> dict[str, Any]:
    """The map of a ``chunk_stats`` message."""
    message: dict[str, Any] = {
        "type": "chunk_stats",
        "session_id": stats.session_id,
        "request_id": stats.request_id,
        "chunk_index": wire_int(stats.chunk_index),
        "event_id": None if stats.event_id is None else wire_int(stats.event_id),
        "request_prepare_ms": wire_ms(stats.request_prepare_ms),
        "scheduler_forward_ms": wire_ms(stats.scheduler_forward_ms),
        "pace_wait_ms": wire_ms(stats.pace_wait_ms),
        "header_write_ms": wire_ms(stats.header_write_ms),
        "raw_payload_build_ms": wire_ms(stats.raw_payload_build_ms),
        "raw_write_ms": wire_ms(stats.raw_write_ms),
        "ws_write_ms": wire_ms(stats.header_write_ms + stats.raw_write_ms),
        # The page divides by it.
        "chunk_total_ms": max(wire_ms(stats.chunk_total_ms), 1),
        "num_batches": stats.num_batches,
        "num_frames": stats.num_frames,
        "raw_bytes": wire_int(stats.raw_bytes),
        "ws_payload_bytes": wire_int(stats.ws_payload_bytes),
        "content_type": stats.content_type,
        "queue_wait_ms": wire_ms(stats.queue_wait_ms),
        "dit_ms": wire_ms(stats.dit_ms),
        "vae_ms": wire_ms(stats.vae_ms),
        "encode_ms": wire_ms(stats.raw_payload_build_ms),
        "event_latency_ms": None if stats.event_latency_ms is None else wire_ms(stats.event_latency_ms),
        "window_frames": wire_int(stats.window_frames),
    }
    message |= {name: wire_ms(ms) for name, ms in stats.postprocess_ms.items()}
    if stats.stages is not None:
        message["stages"] = {name: max(round(ms, 3), 0.0) for name, ms in stats.stages.items()}
    return message


def stats_message(stats: ChunkStats) -> bytes:
    return _ENCODER.encode(stats_fields(stats))


def session_message(session_id: str, capabilities: Mapping[str, Any]) -> bytes:
    """Extension ``session``: once after the session is open."""
    return _ENCODER.encode({"type": "session", "session_id": session_id, "capabilities": dict(capabilities)})


def queue_message(position: int) -> bytes:
    """Extension ``queue``: the place in line, 1 is next; 0 when the slot is taken over."""
    return _ENCODER.encode({"type": "queue", "position": wire_int(position)})


def control_ack_message(event_id: int | None, state: Literal["received", "applied"], chunk_index: int | None) -> bytes:
    """Extension ``control_ack``: an event came in, or a chunk was sampled with it in force."""
    message: dict[str, Any] = {"type": "control_ack", "state": state}
    if event_id is not None:
        message["event_id"] = wire_int(event_id)
    if chunk_index is not None:
        message["chunk_index"] = wire_int(chunk_index)
    return _ENCODER.encode(message)


def heartbeat_message(uptime_ms: float, state: str, chunk_index: int) -> bytes:
    """Extension ``heartbeat``: the session lives although no frame is due. ``state``: "running" or "paused"."""
    return _ENCODER.encode(
        {"type": "heartbeat", "uptime_ms": wire_ms(uptime_ms), "state": state, "chunk_index": wire_int(chunk_index)}
    )
