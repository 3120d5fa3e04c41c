"""The wire's messages: what is accepted, how the rest is refused, and the exact bytes that are sent."""

from __future__ import annotations

import base64
import hashlib
import json

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import EngineFailed, InvalidEvent, InvalidInit, RequestError, SessionBusy
from lingbot_rt.session.controls import parse_event
from lingbot_rt.session.message_reader import MessageReader
from lingbot_rt.session.messages import (
    MAX_EVENT_BYTES,
    MAX_EVENT_VALUES,
    MAX_INIT_VALUES,
    Event,
    Init,
    Resume,
    decode,
    shown,
)
from lingbot_rt.session.plan import Rewound
from lingbot_rt.session.server_messages import (
    ChunkStats,
    ResumeOffer,
    batch_messages,
    control_ack_message,
    error_message,
    heartbeat_message,
    queue_message,
    rewound_message,
    session_message,
    stats_message,
    world_message,
)
from lingbot_rt.session.settings import resolve
from lingbot_rt.transport.encode import EncodedBatch, FrameEncoder, OutputFormat
from tests.server.fake_engine import CARD
from tests.server.wire_types import check_old_clients_can_read

pack = msgspec.msgpack.encode
GOOD = {"type": "init", "prompt": "A street.", "first_frame": b"x"}


def pixels(width: int, height: int, seeds: list[int]) -> np.ndarray:
    """The frames of golden/transport: byte[y][x][c] = (3x + 5y + 40c + 17 seed) mod 256."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return np.stack([((3 * x + 5 * y + 40 * c + 17 * seed) % 256).astype(np.uint8) for seed in seeds])


# --- server to client ---


LEFT_OUT = {
    "metadata_from_batch_upscaled",  # the reference guesses the size from the request; ours reads it off the pixels
    "two_batches_raw",  # two videos in one request
    "empty_frame_list",  # a chunk without frames
    "no_frames_none",
    "other_content_type",  # payloads that are not frames
    "other_content_65535_bytes_of_0x07",
    "other_content_exactly_65536_bytes_of_0x07",
}


def golden_cases(golden) -> list[dict]:
    cases = json.loads(golden("transport/frame_batch_cases.json").read_text())["cases"]
    return [case for case in cases if case["name"] not in LEFT_OUT]


def test_frame_batches_are_the_references_byte_for_byte(golden):
    """Every golden batch comes out in the same form, with the same keys in the same order and the same bytes."""
    played = 0
    for case in golden_cases(golden):
        given_ = case["input"]
        name = given_["realtime_output_format"] or "raw"
        encoder = FrameEncoder(
            OutputFormat(name, given_["output_compression"], given_["realtime_preview_max_width"] or None)
        )
        frames = pixels(given_["width"], given_["height"], list(range(given_["frames_per_batch"])))
        parts = list(encoder.split(frames))
        assert len(parts) == len(case["messages"]), case["name"]
        for index, (part, expected) in enumerate(zip(parts, case["messages"], strict=True)):
            messages = batch_messages(
                encoder.encode(part, event_id=given_["event_id"]),
                request_id=f"req-{case['name']}",
                chunk_index=given_["block_idx"],
                frame_batch_index=index,
                num_frame_batches=len(parts),
                event_id=given_["event_id"],
            )
            check_batch(case["name"], messages, expected)
            played += 1
    assert played == 21


def check_batch(name: str, messages: tuple[bytes, ...], expected: dict) -> None:
    header = msgspec.msgpack.decode(messages[0])
    payload = header.pop("payload", None) if len(messages) == 1 else messages[1]
    assert list(header) == expected["key_order"], name
    if "payload_sha256" in expected:
        assert len(messages) == (1 if expected["form"] == "one_message" else 2), name
        assert header == expected["header"], name
        assert hashlib.sha256(payload).hexdigest() == expected["payload_sha256"], name
        if "msgpack_b64" in expected:
            assert messages[0] == base64.b64decode(expected["msgpack_b64"]), name
    else:  # the codec decides about the bytes
        loose = {"total_size", "payload_lengths", "type"}
        assert {k: v for k, v in header.items() if k not in loose} == {
            k: v for k, v in expected["header"].items() if k not in loose
        }, name
        assert sum(header["payload_lengths"]) == len(payload) == header["total_size"]


def test_delta_gzip_messages_have_the_references_headers(golden):
    """Delta messages come as header and payload, key frames where the reference has them, and the same frames."""
    import gzip

    record = json.loads(golden("transport/delta_gzip.json").read_text())
    width, height, _ = record["description"]["frame_size"]
    frames = [
        np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 3) for data in record["frames_b64"]
    ]
    encoder = FrameEncoder(OutputFormat("delta-gzip"))
    for expected in record["messages"]:
        wanted = expected["header"]
        batch = encoder.encode(np.stack([frames[i] for i in expected["frames"]]), event_id=wanted.get("event_id"))
        messages = batch_messages(
            batch,
            request_id=wanted["request_id"],
            chunk_index=wanted["chunk_index"],
            frame_batch_index=wanted["frame_batch_index"],
            num_frame_batches=wanted["num_frame_batches"],
            event_id=wanted.get("event_id"),
        )
        header = msgspec.msgpack.decode(messages[0])
        assert list(header) == list(wanted)
        assert header | {"total_size": 0} == wanted | {"total_size": 0}
        assert gzip.decompress(messages[1]) == gzip.decompress(base64.b64decode(expected["payload_b64"]))


def test_chunk_stats_begin_with_the_references_keys_and_rounding(golden):
    """The reference's keys come first, in its order, rounded half up and never negative. Ours follow."""
    record = json.loads(golden("transport/control_messages.json").read_text())
    given_, expected = record["inputs"], record["chunk_stats"]["message"]
    stats = ChunkStats("SID", "RID", 2, num_batches=1, num_frames=9, raw_bytes=100, ws_payload_bytes=333)
    stats.content_type = "application/x-raw-rgb"
    for name in ("request_prepare_ms", "scheduler_forward_ms", "pace_wait_ms", "header_write_ms"):
        setattr(stats, name, given_[name])
    for name in ("raw_payload_build_ms", "raw_write_ms", "chunk_total_ms"):
        setattr(stats, name, given_[name])
    message = msgspec.msgpack.decode(stats_message(stats))
    known = record["chunk_stats"]["key_order"]
    assert list(message)[: len(known)] == known
    assert {key: message[key] for key in known} == expected
    assert list(message)[len(known) :] == [
        "queue_wait_ms",
        "dit_ms",
        "vae_ms",
        "encode_ms",
        "event_latency_ms",
        "window_frames",
    ]


def test_profile_adds_the_stages_at_the_end():
    """With ``profile`` the message has the engine's stages by name; without it, no such key."""
    stats = ChunkStats("s", "r", 0, stages={"denoise": 12.3456})
    assert msgspec.msgpack.decode(stats_message(stats))["stages"] == {"denoise": 12.346}
    assert "stages" not in msgspec.msgpack.decode(stats_message(ChunkStats("s", "r", 0)))


def test_a_chunk_never_lasts_zero_milliseconds():
    """Clients divide by chunk_total_ms."""
    assert msgspec.msgpack.decode(stats_message(ChunkStats("s", "r", 0, chunk_total_ms=0.2)))["chunk_total_ms"] == 1


def test_errors_carry_code_and_field_behind_what_clients_know(golden):
    """An error has the reference's keys, with one line of content, and then code and field."""
    message = msgspec.msgpack.decode(error_message(InvalidInit("a\nb", field="size")))
    assert list(message.items()) == [
        ("type", "error"),
        ("content", "invalid generate request: size: a b"),
        ("code", "invalid_init"),
        ("field", "size"),
    ]
    texts = json.loads(golden("transport/control_messages.json").read_text())["error"]["texts"]
    assert SessionBusy().wire_content == texts[3].split(" (")[0]
    assert EngineFailed("x").wire_content.startswith(texts[2].split(":")[0])


counts = st.integers(0, 2**70)
ids = st.none() | st.integers(0, 2**53)
times = st.floats(-1e3, 1e12)


@given(index=counts, event_id=ids, size=st.integers(0, 80000), name=st.sampled_from(["raw", "delta-gzip", "webp"]))
def test_old_clients_read_every_batch(index, event_id, size, name):
    """No batch header has a MessagePack type that existing clients cannot read, whatever its numbers."""
    lengths = (size,) if name == "webp" else None
    batch = EncodedBatch("x", name, 1, bytes(size), lengths, 4096, 4096, 4096, 4096, size)
    messages = batch_messages(
        batch, request_id="r", chunk_index=index, frame_batch_index=0, num_frame_batches=1, event_id=event_id
    )
    check_old_clients_can_read(messages[0])
    assert msgspec.msgpack.decode(messages[0]).get("event_id") == event_id


@settings(max_examples=50)
@example(index=0, event_id=None, ms=-1.5, size=2**40, text="\u00e9\n" * 50_000)
@given(index=counts, event_id=ids, ms=times, size=counts, text=st.text(max_size=300))
def test_old_clients_read_every_other_message(index, event_id, ms, size, text):
    """No other message has one either, with times below zero or above 32 bits and very long texts."""
    stats = ChunkStats("s", "r", index, event_id, ms, ms, ms, ms, ms, ms, ms, 3, 12, size, size, "x", ms, ms, ms, ms)
    stats.stages = {"denoise": ms}
    for message in (
        stats_message(stats),
        error_message(InvalidEvent(text, field=text)),
        session_message("s", {"extensions": ["queue"]}),
        queue_message(3, ms),
        control_ack_message(event_id, "applied", index),
        heartbeat_message(ms, "running", index),
    ):
        check_old_clients_can_read(message)


# --- client to server ---


def test_integral_floats_count_as_integers():
    """Some clients pack 70000 as float64. Integer fields take it."""
    message = decode(pack(GOOD | {"seed": 70000.0, "num_frames": 9.0, "max_chunks": 3.0, "fps": 25}))
    assert isinstance(message, Init)
    assert (message.seed, message.num_frames, message.max_chunks, message.fps) == (70000, 9, 3, 25.0)
    assert type(message.seed) is int
    assert decode(pack({"type": "event", "kind": "prompt", "payload": "x", "event_id": 70000.0})).event_id == 70000


def test_unknown_keys_and_nil_are_as_good_as_absent(caplog):
    """Clients of other versions are served. The debug log names the keys that were ignored."""
    with caplog.at_level("DEBUG"):
        assert decode(pack(GOOD | {"newer": 1, "seed": None, "max_chunks": None})) == decode(pack(GOOD))
    assert "1 unknown keys ignored: ['newer']" in caplog.text


WRONG = {
    "prompt": ["", 3, "x" * 8193, []],
    "first_frame": [3, [1], {}],
    "model": [1],
    "size": [832, [832, 480]],
    "fps": [0, 121, "16", float("nan"), True],
    "num_frames": [0, 82, 9.5, "9", True],
    "seed": [-1, 2**63, 1.5, "1"],
    "num_inference_steps": [0, 51, 1.5],
    "guidance_scale": [-1, 31, "1", float("inf")],
    "negative_prompt": [1, "x" * 8193],
    "max_chunks": [0, -1, 1.5],
    "realtime_causal_sink_size": [-1, 4097, "3"],
    "realtime_causal_kv_cache_num_frames": [0, 4097, "9"],
    "interactive_kv_window": [1, "true"],
    "quality": [1, True],
    "recache": [1, "true"],
    "realtime_output_format": ["gif", 1],
    "output_compression": [0, 101, "90"],
    "realtime_preview_max_width": [-1, 8193],
    "realtime_output_pacing": [1, "yes"],
    "enable_upscaling": [1],
    "upscaling_scale": [1, 5],
    "upscaling_model_path": [1],
    "enable_frame_interpolation": ["true"],
    "frame_interpolation_exp": [0, 4],
    "frame_interpolation_scale": [0, "1"],
    "frame_interpolation_model_path": [1],
    "condition_inputs": [[["w"]], "w"],
    "enhance_prompt": [True, 1],
    "profile": [1],
    "protocol_extensions": ["session", {"a": 1}],
    "pinned_events": [3, [{"chunk": 1, "kind": "prompt"}] * 4097],
    "record": [1, "yes"],
}


def test_the_table_of_wrong_values_has_every_field():
    """A new field must be added to the table of wrong values."""
    assert set(WRONG) == set(Init.__struct_fields__)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(field, value):
    """The error names the field, shows the value and says what is expected."""
    with pytest.raises(InvalidInit) as refused:
        decode(pack(GOOD | {field: value}))
    assert refused.value.field == field
    assert refused.value.wire_content.startswith(f"invalid generate request: {field}: ")
    assert ", expected " in str(refused.value)
    assert "another value" not in str(refused.value)
    assert len(refused.value.wire_content) < 300


@pytest.mark.parametrize("missing", ["prompt", "first_frame"])
def test_a_missing_field_is_refused_by_name(missing):
    """Clients drop empty strings, so the error for a missing prompt says that empty counts as missing."""
    with pytest.raises(InvalidInit, match="missing, expected") as refused:
        decode(pack({key: value for key, value in GOOD.items() if key != missing}))
    assert refused.value.field == missing
    assert ("empty" in str(refused.value)) == (missing == "prompt")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"type": "event"}, "kind"),
        ({"type": "event", "kind": 3}, "kind"),
        ({"type": "event", "kind": "prompt", "event_id": -1}, "event_id"),
        ({"type": "event", "kind": "prompt", "event_id": 1.5}, "event_id"),
        ({"type": "event", "kind": "prompt", "event_id": "7"}, "event_id"),
    ],
)
def test_a_wrong_event_is_an_invalid_event(message, field):
    """An error about an event begins like the reference's and names the field."""
    with pytest.raises(InvalidEvent) as refused:
        decode(pack(message))
    assert refused.value.field == field
    assert refused.value.wire_content.startswith("invalid event: ")


@pytest.mark.parametrize("message", [{}, {"type": "hello"}, {"type": 3}, {"type": None}, [1], 3, None, "init"])
def test_what_is_neither_init_nor_event_is_refused(message):
    """The caller chooses the error for messages that are neither."""
    with pytest.raises(InvalidInit):
        decode(pack(message))
    with pytest.raises(InvalidEvent):
        decode(pack(message), InvalidEvent)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
names = st.sampled_from([*Init.__struct_fields__, *Event.__struct_fields__, "other"])


@settings(max_examples=50)
@given(tag=st.sampled_from(["init", "event"]), fields=st.dictionaries(names, values))
def test_no_map_breaks_the_decoder(tag, fields):
    """Every map gives an Init, an Event or a RequestError."""
    try:
        assert isinstance(decode(pack({"type": tag} | fields)), Init | Event)
    except RequestError as error:
        check_old_clients_can_read(error_message(error))


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(data):
    """Bytes that are not MessagePack, or no map, are refused."""
    with pytest.raises(RequestError):
        decode(data)


# --- forms of values, at every depth ---

EXTENSION = msgspec.msgpack.Ext(18, b"\x89PNG")


def as_str(data: bytes) -> bytes:
    """Bytes of any kind under the type of strings, as libraries of the old specification pack them."""
    return b"\xdb" + len(data).to_bytes(4, "big") + data


def packed(message: dict, replaced: dict[str, bytes], key=pack) -> bytes:
    """A map with some values packed by hand."""
    pairs = [key(name) + replaced.get(name, pack(value)) for name, value in message.items()]
    return b"\xdf" + len(pairs).to_bytes(4, "big") + b"".join(pairs)


def test_integral_floats_count_as_integers_at_every_depth():
    """The entries of pinned events have integers too."""
    entry = {"chunk": 1.0, "kind": "prompt", "payload": "Rain.", "event_id": 70000.0}
    (pinned,) = decode(pack(GOOD | {"pinned_events": [entry]})).pinned_events
    assert (pinned.chunk, pinned.event_id) == (1, 70000)
    assert type(pinned.chunk) is type(pinned.event_id) is int
    assert decode(pack(GOOD | {"fps": np.float32(24).item()})).fps == 24


@pytest.mark.parametrize(
    ("field", "value", "place", "words"),
    [
        ("pinned_events", [{"chunk": -1, "kind": "prompt"}], "pinned_events[0].chunk", ["-1", "0 to 4294967295"]),
        ("pinned_events", [{"chunk": 1, "kind": "x"}, {"kind": "x"}], "pinned_events[1].chunk", ["missing", "0 to"]),
        ("pinned_events", [{"chunk": 1.5, "kind": "x"}], "pinned_events[0].chunk", ["1.5", "whole number"]),
        ("pinned_events", [{"chunk": 1, "kind": 7}], "pinned_events[0].kind", ["7", "camera_actions"]),
        ("pinned_events", [{"chunk": 1, "kind": "x", "event_id": -2}], "pinned_events[0].event_id", ["-2", "2^53"]),
        ("pinned_events", [3], "pinned_events[0]", ["3", "a map with chunk"]),
        ("protocol_extensions", ["session", 1], "protocol_extensions[1]", ["1", "a string"]),
    ],
)
def test_a_wrong_value_inside_a_list_is_refused_by_its_place(field, value, place, words):
    """The error has the place of the entry, its value and what is expected there."""
    with pytest.raises(InvalidInit) as refused:
        decode(pack(GOOD | {field: value}))
    assert refused.value.field == place
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("key", [7, -1, 1.5, None, True, [1], {"a": 1}])
def test_keys_that_are_no_strings_are_unknown_keys(key):
    """At the top and inside a payload."""
    assert decode(packed(GOOD | {"x": 1}, {}, key=lambda name: pack(key if name == "x" else name))) == decode(
        pack(GOOD)
    )
    payload = b"\x82" + pack("mode") + pack("state") + pack(key) + pack("x")
    message = {"type": "event", "kind": "camera_actions", "payload": None}
    assert decode(packed(message, {"payload": payload})).payload == {"mode": "state"}


def test_keys_of_type_bin_are_refused_in_words():
    """A client that packs strings as bin is told what is wrong with its keys, at the top and inside a payload."""
    with pytest.raises(InvalidInit, match="keys must be strings"):
        decode(packed(GOOD, {}, key=lambda name: pack(name.encode())))
    with pytest.raises(InvalidEvent, match="keys must be strings") as refused:
        decode(pack({"type": "event", "kind": "camera_actions", "payload": {b"mode": "state"}}), InvalidEvent)
    assert refused.value.field == "payload"
    assert decode(pack(GOOD | {"unread": {b"a": 1}})) == decode(pack(GOOD))


@pytest.mark.parametrize("field", [name for name in Init.__struct_fields__ if name != "condition_inputs"])
def test_an_extension_is_refused_by_name_in_every_field(field):
    """The error has the field, the extension's type and the type that is expected instead, but no object."""
    with pytest.raises(InvalidInit) as refused:
        decode(pack(GOOD | {field: EXTENSION}))
    assert refused.value.field == field
    for word in ("extension", "18", "bin", "expected"):
        assert word in str(refused.value)
    assert "object at" not in str(refused.value)


@pytest.mark.parametrize("value", [EXTENSION, msgspec.msgpack.Ext(-1, bytes(4)), msgspec.msgpack.Ext(-1, bytes(3))])
def test_an_extension_in_an_event_is_refused_by_name(value):
    """Timestamps, whole and broken, are extensions like any other."""
    for field in ("kind", "event_id"):
        with pytest.raises(InvalidEvent, match=f"extension of type {value.code} .*bin.*expected") as refused:
            decode(pack({"type": "event", "kind": "prompt", "payload": "x"} | {field: value}))
        assert refused.value.field == field
    event = decode(pack({"type": "event", "kind": "prompt", "payload": value}))
    with pytest.raises(InvalidEvent, match=f"extension of type {value.code}") as refused:
        parse_event(event.kind, event.payload)
    assert refused.value.field == "prompt"


@pytest.mark.parametrize("field", ["first_frame", "prompt", "size", "model", "realtime_output_format"])
def test_a_string_that_is_not_utf8_is_refused_by_name(field):
    """A picture packed as a string, and text in another encoding."""
    with pytest.raises(InvalidInit) as refused:
        decode(packed(GOOD | {field: ""}, {field: as_str(b"\x89PNG")}))
    assert refused.value.field == field
    for word in ("string", "not UTF-8", "bin"):
        assert word in str(refused.value)


def test_what_stands_under_an_unknown_key_refuses_nothing():
    """Extensions, strings that are not UTF-8 and odd keys there are skipped."""
    for value in (
        pack(EXTENSION),
        as_str(b"\xff"),
        b"\x81" + pack(b"key") + as_str(b"\xff"),
        pack([[{"a": EXTENSION}]]),
    ):
        assert decode(packed(GOOD | {"newer": None}, {"newer": value})) == decode(pack(GOOD))


@settings(max_examples=200)
@given(values)
def test_the_reader_reads_every_value(value):
    """Values of all types and sizes come out as they went in, integral floats as integers."""
    event = decode(pack({"type": "event", "kind": "x", "payload": value}))
    assert pack(event.payload) == pack(_whole(value))


def _whole(value):
    match value:
        case float() if value.is_integer() and -(2**63) <= value < 2**64:
            return int(value)
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {key: _whole(item) for key, item in value.items() if isinstance(key, str)}
    return value


@pytest.mark.parametrize("head", [b"\xc4", b"\xc5", b"\xc6", b"\xd9", b"\xda", b"\xdb", b"\xc7", b"\xc8", b"\xc9"])
def test_every_size_of_bytes_strings_and_extensions_is_read(head):
    """8, 16 and 32 bits of length."""
    size = {0: 1, 1: 2, 2: 4}[(head[0] - 0xC4) % 3 if head[0] < 0xD0 else head[0] - 0xD9]
    code = b"\x05" if 0xC7 <= head[0] <= 0xC9 else b""
    value = head + (3).to_bytes(size, "big") + code + b"abc"
    payload = decode(packed({"type": "event", "kind": "x", "payload": None}, {"payload": value})).payload
    if code:
        assert "extension of type 5" in str(payload)
    else:
        assert payload == (b"abc" if head[0] < 0xD0 else "abc")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pack([1]), "a list, expected a MessagePack map"),
        (pack("init"), "a string, expected a MessagePack map"),
        (pack(3), "a single value, expected a MessagePack map"),
        (b"", "ends after 0 bytes"),
        (pack(GOOD)[:-1], "in the middle of a value"),
        (pack(GOOD) + b"xx", "2 bytes follow"),
        (b"\x81\xa4type\xc1", "0xc1"),
    ],
)
def test_what_is_no_map_is_refused_in_words(data, words):
    """The error says what is wrong with the bytes, without a library's text."""
    with pytest.raises(InvalidInit, match=words):
        decode(data)


# --- limits ---


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Counts the values that are read from messages."""
    counted: list[int] = []
    read = MessageReader._head
    monkeypatch.setattr(MessageReader, "_head", lambda reader: counted.append(1) or read(reader))
    return counted


EVENT = {"type": "event", "kind": "camera_actions", "payload": None}
STATE = {"mode": "state", "transitions": [{"actions": ["w"], "client_ts_ms": 0}] * 500_000}


@pytest.mark.parametrize("refusal", [InvalidInit, InvalidEvent])
@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (EVENT, "payload", b"\xdd" + (8_000_000).to_bytes(4, "big") + b"\x90" * 8_000_000),
        (EVENT, "payload", b"\xdd" + (4_000).to_bytes(4, "big") + (b"\xdc\x0f\xa0" + b"\x90" * 4_000) * 1_000),
        (EVENT, "payload", pack(STATE)),
        (GOOD, "newer", b"\xdd" + (16_000_000).to_bytes(4, "big") + b"\x90" * 16_000_000),
        (GOOD, "newer", b"\xdc\x0f\xa0" + (b"\xdc\x0f\xa0" + b"\x90" * 4_000) * 4_000),
        (GOOD, "pinned_events", b"\xdd" + (2_000_000).to_bytes(4, "big") + b"\x81\xa0" * 2_000_000),
    ],
)
def test_many_small_values_are_refused_before_they_are_read(reads, message, field, value, refusal):
    """An event has at most 20,000 values and an init 200,000: no more are looked at, whatever the message holds."""
    limit = MAX_EVENT_VALUES if refusal is InvalidEvent else MAX_INIT_VALUES
    with pytest.raises(RequestError, match=r"too many values.* at most|the message has \d+ bytes.* at most \d+"):
        decode(packed(message | {field: None}, {field: value}), refusal)
    assert len(reads) <= limit + 10


def test_limits_leave_room_for_what_is_legal():
    """A full script, a long prompt and 4096 pinned key events pass."""
    script = [["w", "a", "s", "d", "i", "j", "k", "l"]] * 512
    composite = {"input_types": ["prompt", "camera_actions"], "prompt": "\u6c34" * 8192, "camera_actions": script}
    assert parse_event("composite_input", decode(pack(EVENT | {"payload": composite}), InvalidEvent).payload)
    keys = {"mode": "state", "transitions": [{"actions": ["w", "d", "l"], "client_ts_ms": 1.5}]}
    entry = {"chunk": 1, "kind": "composite_input", "event_id": 5}
    entry["payload"] = {"input_types": ["prompt", "camera_actions"], "prompt": "Rain.", "camera_actions": keys}
    assert (
        len(decode(pack(GOOD | {"pinned_events": [entry] * 4096, "first_frame": bytes(10**7)})).pinned_events) == 4096
    )


def test_a_large_event_is_refused_unread(reads, monkeypatch):
    """In a session, a message above 256 KiB is refused with its size and the limit before its first byte is read, and
    before a session without building anything but its type."""
    data = pack(EVENT | {"payload": "x" * MAX_EVENT_BYTES})
    with pytest.raises(InvalidEvent, match=f"{len(data)} bytes.* at most {MAX_EVENT_BYTES}"):
        decode(data, InvalidEvent)
    assert not reads
    sizes, taken = [], MessageReader._bytes
    monkeypatch.setattr(
        MessageReader, "_bytes", lambda reader, start: sizes.append(reader._at - start) or taken(reader, start)
    )
    for message in (data, pack({"type": "event", "kind": "prompt", "payload": bytes(10**6)})):
        with pytest.raises(InvalidEvent, match=f"at most {MAX_EVENT_BYTES}"):
            decode(message)
    assert max(sizes) < 100


def test_deep_nesting_is_refused():
    """A message nested deeper than the interpreter's stack is an error like any other, with the limit."""
    with pytest.raises(InvalidInit, match="nested more than 32 deep") as refused:
        decode(b"\x81\xa4type" + b"\x91" * 100_000)
    assert refused.value.field.startswith("type[0][0]")
    assert len(refused.value.wire_content) < 200


def test_a_message_in_the_error_shows_no_control_characters():
    """Keys of a client stand escaped and shortened in the place of an error."""
    key = "\x1b[31m" + "x" * 1000
    with pytest.raises(InvalidInit, match="nested") as refused:
        decode(packed({key: None}, {key: b"\x91" * 50 + b"\xc0"}))
    assert refused.value.wire_content.isprintable()
    assert len(refused.value.wire_content) < 300


@pytest.mark.parametrize("key", ["kind", "event_id", "type"])
def test_a_wrong_value_of_any_depth_is_refused(key):
    """Also at depths that decoding just manages, such as 984: making the error needs no deeper stack."""
    tag = b"" if key == "type" else b"\xa4type" + pack("event")
    for depth in (1, 2, *range(100, 900, 100), *range(930, 1100)):
        nested = b"\x91" * depth + b"\xc0"
        with pytest.raises(InvalidEvent) as refused:
            decode(bytes([0x81 + bool(tag)]) + tag + pack(key) + nested, InvalidEvent)
        assert len(str(refused.value)) < 200


@given(values)
def test_shown_values_are_one_short_line(value):
    """Whatever a client sent, an error shows it on one line of at most 80 characters."""
    text = shown(value)
    assert len(text) <= 80
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([832, 480], "[832, 480]"),
        ([["w"], {"a": 1.5}], "[['w'], {'a': 1.5}]"),
        ([[["w"]], [[]]], "[[[...]], [[]]]"),
        ([0, 1, 2, 3, 4], "[0, 1, 2, 3, ...]"),
        ({}, "{}"),
        (b"\x89PNG", "4 bytes (bin)"),
        ("a\nb", "'a\\nb'"),
        ("x" * 100, "'" + "x" * 76 + "..."),
        (object(), "object"),
    ],
)
def test_shown_values_keep_what_helps(value, text):
    """Errors show small values whole, the beginning of large ones, and the size of pictures."""
    assert shown(value) == text


# --- an init that resumes ---

RESUME = {"type": "init", "resume": "token"}


def test_an_init_with_the_key_resume_needs_no_picture():
    """A token is a string, a saved world is bytes; everything else stays as it was."""
    assert decode(pack(RESUME)) == Resume(resume="token")
    assert decode(pack(RESUME | {"resume": b"file", "prompt": 3, "received_chunk": 7.0})).received_chunk == 7
    assert isinstance(decode(pack(GOOD | {"resume": None})), Init)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("resume", 3, "the resume_token of a session message, or the bytes of a saved world"),
        ("received_chunk", -1, "a whole number from 0 to 4294967295"),
        ("realtime_output_format", "png", "one of webp, jpeg, raw, delta-gzip"),
        ("max_chunks", 0, "a whole number, at least 1"),
        ("protocol_extensions", "session", "a list of extension names"),
    ],
)
def test_a_wrong_field_of_it_is_named(field, value, expected):
    """As for every init: the field, the value and what is expected."""
    with pytest.raises(InvalidInit, match=expected) as refused:
        decode(pack(RESUME | {field: value}))
    assert refused.value.field == field


def test_messages_about_kept_worlds_can_be_read_by_old_clients():
    """No type byte that they fail on; a world that no message can carry is refused."""
    place = Rewound(2**33, 3, exact=True)
    offer = ResumeOffer("token", 60.0)
    messages = [
        rewound_message(place, 2**40),
        world_message(bytes(70000), 7, None),
        session_message("s", {"extensions": ["session"]}, offer, place),
    ]
    for message in messages:
        check_old_clients_can_read(message)
    read = msgspec.msgpack.decode(messages[2])
    assert read["resume_token"] == "token"
    assert (read["resumed"], read["chunk_index"], read["branch"], read["exact"]) == (True, 2.0**33, 3, True)

    class Huge(bytes):
        def __len__(self) -> int:
            return 2**32

    with pytest.raises(InvalidEvent, match="4294967296 bytes"):
        world_message(Huge(), 7, None)


# --- the script of an init ---


@pytest.mark.parametrize(
    ("script", "place", "text"),
    [
        ("w", "", "'w'"),
        ([["w"], ["x"]], "[1]", "'x'"),
        ([["w"]] * 513, "", "513"),
    ],
)
def test_a_wrong_script_is_refused_by_its_place_in_the_init(script, place, text):
    """The error is an InvalidInit, names the place from the top of the init and shows what is wrong there."""
    init = decode(pack(GOOD | {"condition_inputs": {"camera_actions": script}}))
    with pytest.raises(InvalidInit, match=text) as refused:
        resolve(init, CARD, ServeConfig())
    assert refused.value.field == f"condition_inputs.camera_actions{place}"
