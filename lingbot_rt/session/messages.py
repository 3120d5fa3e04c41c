"""The messages that clients send: bytes in, checked structs out. ``server_messages.py`` has those that clients get.

The structs ``Init``, ``Resume`` and ``Event`` specify them. Each field has its range and says in words what it takes;
the checks and the error messages both come from there. ``docs/wire.md`` has the same tables for readers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from lingbot_rt.config import OUTPUT_FORMATS, FormatName
from lingbot_rt.errors import InvalidEvent, InvalidInit, RequestError
from lingbot_rt.session.message_reader import MessageReader, Unreadable
from lingbot_rt.session.shown import MAX_SHOWN, shown

log = logging.getLogger(__name__)

RAW_TYPE = "application/x-raw-rgb"
DELTA_GZIP_TYPE = "application/x-raw-rgb-delta-gzip"
ENCODED_TYPES = {"webp": "image/webp", "jpeg": "image/jpeg"}
"""Content types of frame batches."""

EXTENSIONS = (
    *("session", "queue", "warming", "control_ack", "heartbeat", "pause", "pinned_events", "warning", "history"),
)
"""Names an init may list in ``protocol_extensions``. Other names are ignored."""

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


# --- client to server ---------------------------------------------------------------------------------------------


def _range(low: int, high: int, what: str = "a whole number") -> Meta:
    return Meta(ge=low, le=high, description=f"{what} from {low} to {high}")


_Text = Annotated[str, Meta(description="a string")]
_Flag = Annotated[bool, Meta(description="true or false")]
_EventId = Annotated[int, Meta(ge=0, le=_MAX_EVENT_ID, description="a whole number from 0 to 2^53")]
_EventKind = Annotated[str, Meta(max_length=64, description="prompt, camera_actions, camera_poses or composite_input")]
_Format = Annotated[FormatName, Meta(description=f"one of {', '.join(OUTPUT_FORMATS)}")]
_Compression = Annotated[int, _range(1, 100)]
_PreviewWidth = Annotated[
    int, Meta(ge=0, le=8192, description="a whole number of pixels from 0 to 8192; 0 is no limit")
]
_MaxChunks = Annotated[int, Meta(ge=1, le=_MAX_UINT32, description="a whole number, at least 1")]
_Extensions = Annotated[tuple[str, ...], Meta(description="a list of extension names")]


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
    max_chunks: _MaxChunks | None = None
    realtime_causal_sink_size: Annotated[int, _range(0, 4096, "a whole number of latent frames")] | None = None
    realtime_causal_kv_cache_num_frames: Annotated[int, _range(1, 4096, "a whole number of latent frames")] | None = (
        None
    )
    interactive_kv_window: _Flag | None = None
    quality: _Text | None = None
    recache: _Flag = False
    realtime_output_format: _Format | None = None
    output_compression: _Compression | None = None
    realtime_preview_max_width: _PreviewWidth | None = None
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
    protocol_extensions: _Extensions = ()
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


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="init"):
    """An init with the key ``resume``: a session goes on, and what is not named stays as it was."""

    resume: Annotated[  # bytes | str, as `Init.first_frame`
        Any, Meta(description="the resume_token of a session message, or the bytes of a saved world")
    ]
    received_chunk: Annotated[int, _range(0, _MAX_UINT32)] | None = None
    received_frames: Annotated[int, _range(0, _MAX_UINT32)] | None = None
    protocol_extensions: _Extensions | None = None
    realtime_output_format: _Format | None = None
    output_compression: _Compression | None = None
    realtime_preview_max_width: _PreviewWidth | None = None
    realtime_output_pacing: _Flag | None = None
    max_chunks: _MaxChunks | None = None
    profile: _Flag | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.resume, bytes | str):
            raise TypeError("resume must be bytes or str")


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="event"):
    """A message into a running session. ``controls.py`` checks ``payload``."""

    kind: _EventKind
    payload: Any = None
    event_id: _EventId | None = None


ClientMessage = Init | Resume | Event

_KNOWN_KEYS = frozenset({"type", *Init.__struct_fields__, *Resume.__struct_fields__, *Event.__struct_fields__})


def decode(data: bytes | bytearray, refusal: type[RequestError] = InvalidInit) -> ClientMessage:
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
    message: ClientMessage
    try:
        message = msgspec.convert(given, Resume if _resumes(given) else Init | Event)
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


def _resumes(given: Mapping[str, Any]) -> bool:
    return given.get("type") == "init" and "resume" in given


def _explained(given: Mapping[str, Any], refusal: type[RequestError]) -> RequestError:
    """The error for a map that is neither a valid init nor a valid event. Names the first field that is wrong."""
    struct: type[Init] | type[Resume] | type[Event]
    match given.get("type"):
        case "init":
            struct, refusal = Resume if _resumes(given) else Init, InvalidInit
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
    if field.name in ("first_frame", "resume"):
        return isinstance(value, bytes | str)
    return _converts(value, field.type)


def _converts(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
