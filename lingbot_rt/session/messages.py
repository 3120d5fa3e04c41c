"""The wire's messages: decodes what clients send and encodes what they get. Bytes in, bytes out.

The structs ``Init`` and ``Event`` specify the messages of clients. Each field has its range and says in words what it
takes; the checks and the error messages both come from there. ``docs/wire.md`` has the same tables for readers.

Existing clients cannot read negative integers, uint64, int8..64, str32, map32 or ext types. No message here has them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from lingbot_rt.config import OUTPUT_FORMATS, FormatName
from lingbot_rt.errors import InvalidEvent, InvalidInit, LingbotError, RequestError
from lingbot_rt.session.message_reader import MessageReader, Unreadable
from lingbot_rt.session.shown import MAX_SHOWN, shown

log = logging.getLogger(__name__)

RAW_TYPE = "application/x-raw-rgb"
DELTA_GZIP_TYPE = "application/x-raw-rgb-delta-gzip"
ENCODED_TYPES = {"webp": "image/webp", "jpeg": "image/jpeg"}
"""Content types of frame batches."""

EXTENSIONS = ("session", "queue", "warming", "control_ack", "heartbeat", "pause", "pinned_events", "warning")
"""Names an init may list in ``protocol_extensions``. Other names are ignored."""

AckState = Literal["received", "applied", "dropped"]
"""What a ``control_ack`` says: each event is received, and then applied or dropped."""

INLINE_PAYLOAD_LIMIT = 65536
"""A payload below this many bytes travels inside its header map. A larger one is a message of its own."""

WIRE_SIZE = "832x480"
"""The size of an init that names none."""

MAX_PROMPT_CHARACTERS = 8192
MAX_NUM_FRAMES = 81
FPS_RANGE = (1, 120)
STEPS_RANGE = (1, 50)

MAX_INIT_VALUES = 200_000
MAX_EVENT_VALUES = 20_000
"""Most items, keys and containers of a message, unknown ones included."""

MAX_EVENT_BYTES = 256 * 2**10
MAX_PINNED_EVENTS = 4096

_MAX_UINT32 = 2**32 - 1
_MAX_EVENT_ID = 2**53  # JavaScript has no exact integers above it
_MAX_TEXT = 2000


# --- client to server ---------------------------------------------------------------------------------------------


def _range(low: int, high: int, what: str = "a whole number") -> Meta:
    return Meta(ge=low, le=high, description=f"{what} from {low} to {high}")


_Text = Annotated[str, Meta(description="a string")]
_Flag = Annotated[bool, Meta(description="true or false")]
_EventId = Annotated[int, Meta(ge=0, le=_MAX_EVENT_ID, description="a whole number from 0 to 2^53")]
_EventKind = Annotated[str, Meta(max_length=64, description="prompt, camera_actions, camera_poses or composite_input")]


class PinnedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event inside an init. Chunk ``chunk`` is the first that samples it, whatever the timing."""

    chunk: Annotated[int, _range(0, _MAX_UINT32)]
    kind: _EventKind
    payload: Any = None
    event_id: _EventId | None = None


class Init(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="init"):
    """The first message of a session. Each annotation is ``Annotated[T, Meta]`` or ``Annotated[T, Meta] | None``."""

    prompt: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_PROMPT_CHARACTERS,
            description=f"a sentence of 1 to {MAX_PROMPT_CHARACTERS} characters that describes the world "
            "(empty counts as missing)",
        ),
    ]
    first_frame: Annotated[  # bytes | str: msgspec has no such union, so `__post_init__` checks it
        Any, Meta(description="the bytes of a picture, a data: URL, or a path or URL the server allows")
    ]
    model: _Text = ""
    size: Annotated[str, Meta(max_length=40, description="WIDTHxHEIGHT, for example 832x480")] = WIRE_SIZE
    fps: Annotated[float, _range(*FPS_RANGE, "a number")] = 16.0
    num_frames: Annotated[int, _range(1, MAX_NUM_FRAMES)] = 9
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="a whole number from 0 to 2^63-1")] = 42
    num_inference_steps: Annotated[int, _range(*STEPS_RANGE)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=30, description="a number from 0 to 30; 1 is no guidance")] = 1.0
    negative_prompt: Annotated[
        str,
        Meta(max_length=MAX_PROMPT_CHARACTERS, description=f"a string of at most {MAX_PROMPT_CHARACTERS} characters"),
    ] = ""
    max_chunks: Annotated[int, Meta(ge=1, le=_MAX_UINT32, description="a whole number, at least 1")] | None = None
    realtime_causal_sink_size: Annotated[int, _range(0, 4096, "a whole number of latent frames")] | None = None
    realtime_causal_kv_cache_num_frames: Annotated[int, _range(1, 4096, "a whole number of latent frames")] | None = (
        None
    )
    interactive_kv_window: _Flag | None = None
    quality: _Text | None = None
    recache: _Flag = False
    realtime_output_format: Annotated[FormatName, Meta(description=f"one of {', '.join(OUTPUT_FORMATS)}")] | None = None
    output_compression: Annotated[int, _range(1, 100)] | None = None
    realtime_preview_max_width: (
        Annotated[int, Meta(ge=0, le=8192, description="a whole number of pixels from 0 to 8192; 0 is no limit")] | None
    ) = None
    realtime_output_pacing: _Flag = False
    enable_upscaling: _Flag = False
    upscaling_scale: Annotated[int, Meta(ge=2, le=4, description="2, 3 or 4")] = 4
    upscaling_model_path: _Text | None = None
    enable_frame_interpolation: _Flag = False
    frame_interpolation_exp: Annotated[int, Meta(ge=1, le=3, description="1, 2 or 3")] = 1
    frame_interpolation_scale: Annotated[float, Meta(gt=0, le=8, description="a number above 0, at most 8")] = 1.0
    frame_interpolation_model_path: _Text | None = None
    condition_inputs: (
        Annotated[dict[str, Any], Meta(description="a map with camera_actions or camera_poses")] | None
    ) = None
    enhance_prompt: Annotated[Literal[False], Meta(description="false: prompts are never rewritten")] = False
    profile: _Flag = False
    protocol_extensions: Annotated[tuple[str, ...], Meta(description="a list of extension names")] = ()
    pinned_events: Annotated[
        tuple[PinnedEvent, ...],
        Meta(
            max_length=MAX_PINNED_EVENTS,
            description=f"a list of at most {MAX_PINNED_EVENTS} maps with chunk, kind, payload, event_id",
        ),
    ] = ()
    record: _Flag = False

    def __post_init__(self) -> None:
        if not isinstance(self.first_frame, bytes | str):
            raise TypeError("first_frame must be bytes or str")


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="event"):
    """A message into a running session. ``controls.py`` checks ``payload``."""

    kind: _EventKind
    payload: Any = None
    event_id: _EventId | None = None


_KNOWN_KEYS = frozenset({"type", *Init.__struct_fields__, *Event.__struct_fields__})
_ENCODER = msgspec.msgpack.Encoder()


def decode(data: bytes | bytearray, refusal: type[RequestError] = InvalidInit) -> Init | Event:
    """One binary client message. A nil value counts as an absent key. Unknown keys are ignored.

    ``refusal`` is the error for bytes that are neither; InvalidEvent says that only an event can come, and the limits
    are those of an event from the first byte on. Raises InvalidInit for a wrong init, InvalidEvent for a wrong event,
    and no other exception, whatever the bytes.
    """
    if refusal is InvalidEvent:
        _check_event_size(len(data), values=0)
    elif len(data) > MAX_EVENT_BYTES:
        kind = _read(MessageReader(data, MAX_INIT_VALUES), {"type"}, refusal)[0].get("type")
        if kind == "event":
            _check_event_size(len(data), values=0)
    reader = MessageReader(data, MAX_EVENT_VALUES if refusal is InvalidEvent else MAX_INIT_VALUES)
    read, unknown = _read(reader, _KNOWN_KEYS, refusal)
    given = {key: value for key, value in read.items() if value is not None}
    if given.get("type") == "event":
        _check_event_size(len(data), reader.values)
    try:
        message = msgspec.convert(given, Init | Event)
    except msgspec.ValidationError:
        raise _explained(given, refusal) from None
    unknown += [key for key in given if key not in ("type", *message.__struct_fields__)]
    if unknown:
        log.debug("%s message: %d unknown keys ignored: %s", given["type"], len(unknown), shown(unknown))
    return message


def _read(
    reader: MessageReader, known: Collection[str], refusal: type[RequestError]
) -> tuple[dict[str, Any], list[str]]:
    try:
        return reader.read(known)
    except Unreadable as error:
        raise refusal(str(error), field=_place(error.path) or None) from None


def _check_event_size(size: int, values: int) -> None:
    if size > MAX_EVENT_BYTES:
        raise InvalidEvent(f"the message has {size} bytes, an event at most {MAX_EVENT_BYTES}")
    if values > MAX_EVENT_VALUES:
        raise InvalidEvent(f"the message has {values} values, an event at most {MAX_EVENT_VALUES}")


def _place(path: list[str | int]) -> str:
    """``["pinned_events", 0, "chunk"]`` -> ``pinned_events[0].chunk``, without control characters and not too long."""
    parts = (
        f"[{part}]" if isinstance(part, int) else f".{part if part.isidentifier() else shown(part)}" for part in path
    )
    return "".join(parts).removeprefix(".")[:MAX_SHOWN]


def _explained(given: Mapping[str, Any], refusal: type[RequestError]) -> RequestError:
    """The error for a map that is neither a valid Init nor a valid Event. Names the first field that is wrong."""
    struct: type[Init] | type[Event]
    match given.get("type"):
        case "init":
            struct, refusal = Init, InvalidInit
        case "event":
            struct, refusal = Event, InvalidEvent
        case tag:
            return refusal(f'{shown(tag)}, expected "init" or "event"', field="type")
    place, problem = _first_problem(struct, given)
    return refusal(problem, field=place)


@cache
def _fields(struct: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Kept: finding them takes milliseconds, and a client may send thousands of wrong messages."""
    return msgspec.structs.fields(struct)


def _first_problem(struct: type[msgspec.Struct], given: Mapping[str, Any]) -> tuple[str, str]:
    """Place and text of the first wrong field of a map that does not convert to ``struct``."""
    wrong = next(field for field in _fields(struct) if not _is_valid(given.get(field.name), field))
    value = given.get(wrong.name)
    if isinstance(value, list) and wrong.name == "protocol_extensions":
        index = next(index for index, item in enumerate(value) if not isinstance(item, str))
        return f"{wrong.name}[{index}]", f"{shown(value[index])}, expected a string"
    if isinstance(value, list) and wrong.name == "pinned_events":
        if len(value) > MAX_PINNED_EVENTS:
            return wrong.name, f"{len(value)} entries, expected at most {MAX_PINNED_EVENTS}"
        index = next(index for index, item in enumerate(value) if not _converts(item, PinnedEvent))
        place = f"{wrong.name}[{index}]"
        if not isinstance(value[index], dict):
            return place, f"{shown(value[index])}, expected a map with chunk, kind, payload, event_id"
        inner, problem = _first_problem(PinnedEvent, value[index])
        return f"{place}.{inner}", problem
    problem = "missing" if value is None else shown(value)
    annotated = wrong.type if hasattr(wrong.type, "__metadata__") else get_args(wrong.type)[0]  # of ``X | None``
    return wrong.name, f"{problem}, expected {annotated.__metadata__[0].description}"


def _is_valid(value: Any, field: msgspec.structs.FieldInfo) -> bool:
    if value is None:
        return not field.required
    if field.name == "first_frame":
        return isinstance(value, bytes | str)
    return _converts(value, field.type)


def _converts(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


# --- server to client ---------------------------------------------------------------------------------------------


def _count(value: int) -> int | float:
    """A count as clients can read it: never negative, and float64 above 32 bits."""
    return max(value, 0) if value <= _MAX_UINT32 else float(value)


def _ms(value: float) -> int | float:
    """Milliseconds, rounded half up, never negative."""
    return _count(int(value + 0.5))


def _line(text: str) -> str:
    return " ".join(text.split())[:_MAX_TEXT]


def error_message(error: LingbotError) -> bytes:
    """``content`` is one line of at most 2000 characters; ``field`` is there only when the error names one."""
    message: dict[str, Any] = {"type": "error", "content": _line(error.wire_content), "code": error.code}
    if error.field is not None:
        message["field"] = error.field[:_MAX_TEXT]
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
    if stats.stages is not None:
        message["stages"] = {name: max(round(ms, 3), 0.0) for name, ms in stats.stages.items()}
    return message


def stats_message(stats: ChunkStats) -> bytes:
    return _ENCODER.encode(stats_fields(stats))


def session_message(session_id: str, capabilities: Mapping[str, Any]) -> bytes:
    """Extension ``session``: sent once, when the session is open."""
    return _ENCODER.encode({"type": "session", "session_id": session_id, "capabilities": dict(capabilities)})


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
