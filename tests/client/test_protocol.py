"""The client's protocol without a socket."""

from __future__ import annotations

import base64
import contextlib
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_rt.client.protocol import BaseSession, ClientProtocol, init_message
from lingbot_rt.errors import (
    ClientError,
    EventRefused,
    InitRefused,
    KeyRefused,
    MessageRefused,
    ProtocolError,
    ServerBusy,
    ServerNotReady,
    SessionLost,
)
from lingbot_rt.session.controls import PromptEvent, parse_event
from lingbot_rt.session.messages import DELTA_GZIP_TYPE, RAW_TYPE

pack = msgspec.msgpack.encode


class RecordingSession(BaseSession[int]):
    """A session that stores its messages instead of sending them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[dict] = []

    def _send(self, message: bytes, event_id: int) -> int:
        self.messages.append(msgspec.msgpack.decode(message))
        return event_id


def test_methods_send_events_that_the_server_parses():
    """Each method sends one event with the next id, and the server's parser takes its payload."""
    session = RecordingSession()
    assert [
        session.press("w"),
        session.press("a"),
        session.release("w"),
        session.release(),
        session.prompt("Rain."),
    ] == [
        1,
        2,
        3,
        4,
        5,
    ]
    session.script([["w"], []])
    session.prompt("Snow.", recache=True)
    assert parse_event("prompt", session.messages[-1]["payload"]) == (PromptEvent("Snow.", recache=True),)
    held = [message["payload"]["transitions"][0]["actions"] for message in session.messages[:4]]
    assert held == [["w"], ["w", "a"], ["a"], []]
    assert [message["event_id"] for message in session.messages] == [1, 2, 3, 4, 5, 6, 7]
    for message in session.messages:
        assert parse_event(message["kind"], message["payload"])


def test_header_and_payload_in_two_messages():
    """The message after a frame_batch_header is its payload."""
    protocol = ClientProtocol()
    fields = {
        "type": "frame_batch_header",
        "chunk_index": 3,
        "content_type": "application/x-raw-rgb",
        "num_frames": 2,
        "width": 2,
        "height": 1,
        "event_id": 9,
    }
    assert protocol.receive(pack(fields)) == []
    frames = protocol.receive(bytes(range(12)))
    assert [(frame.index, frame.chunk_index, frame.event_id) for frame in frames] == [(0, 3, 9), (1, 3, 9)]
    np.testing.assert_array_equal(frames[1].pixels, [[[6, 7, 8], [9, 10, 11]]])


def test_recorded_stats_and_error(golden):
    """The recorded chunk_stats becomes ChunkStats. Fields that only this server sends are None."""
    record = json.loads(golden("transport/control_messages.json").read_text())
    protocol = ClientProtocol()
    protocol.receive(base64.b64decode(record["chunk_stats"]["msgpack_b64"]))
    (stats,) = protocol.stats
    assert (stats.chunk_index, stats.num_frames, stats.chunk_total_ms) == (2, 9, 1251)
    assert stats.dit_ms is None
    assert stats.overhead_ms is None
    with pytest.raises(EventRefused):
        protocol.receive(base64.b64decode(record["error"]["msgpack_b64"]))


STATS = {"type": "chunk_stats", "chunk_index": 0, "num_frames": 9, "chunk_total_ms": 100}


@pytest.mark.parametrize(("vae_ms", "overhead_ms", "overlaps"), [(20, 10, False), (30, 0, False), (40.5, 0, True)])
def test_overhead(vae_ms, overhead_ms, overlaps):
    """Chunk time minus DiT and VAE time, never negative: the two may run at the same time."""
    protocol = ClientProtocol()
    protocol.receive(pack(STATS | {"dit_ms": 70, "vae_ms": vae_ms}))
    assert protocol.stats[0].overhead_ms == overhead_ms
    assert protocol.stats[0].overlaps is overlaps


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"chunk_total_ms": "5"}, "chunk_total_ms"), ({"num_frames": None}, "num_frames"), ({"dit_ms": []}, "dit_ms")],
)
def test_wrong_statistics_are_named(changes, named):
    """Statistics of a wrong type are refused when they come, not when they are printed."""
    with pytest.raises(ProtocolError, match=named):
        ClientProtocol().receive(pack(STATS | changes))


@pytest.mark.parametrize(
    ("content", "kind", "reconnectable"),
    [
        ("another realtime session is already active", ServerBusy, True),
        ("the server is not ready: warming up 10 %; try again", ServerNotReady, True),
        ("invalid generate request: size: no", InitRefused, False),
        ("invalid event: unknown action", EventRefused, False),
        ("a valid API key is needed: ...", KeyRefused, False),
        ("the message is larger than 1 MiB", MessageRefused, False),
    ],
)
def test_error_messages_have_classes(content, kind, reconnectable):
    """The server's refusals become exceptions with its message, and say whether to reconnect."""
    with pytest.raises(kind, match=content) as caught:
        ClientProtocol().receive(pack({"type": "error", "content": content}))
    assert caught.value.reconnectable is reconnectable


def test_the_error_before_an_abnormal_close():
    """``closed`` raises the error that the server sent before the close. A normal close raises nothing."""
    protocol = ClientProtocol()
    protocol.closed(1000, "generation complete")
    assert protocol.receive(pack({"type": "error", "content": "the server stops"})) == []
    with pytest.raises(SessionLost, match="the server stops") as caught:
        protocol.closed(1001, "")
    assert caught.value.close_code == 1001
    assert caught.value.reconnectable


def test_unknown_messages_are_ignored():
    """A message type of a later server is ignored."""
    assert ClientProtocol().receive(pack({"type": "weather", "sun": True})) == []


VALUES = st.integers(-5, 2**32) | st.text(max_size=9) | st.binary(max_size=9) | st.none() | st.lists(st.integers(0, 9))
TYPES = st.sampled_from(["frame_batch", "frame_batch_header", "chunk_stats", "error", "other"])
CONTENT_TYPES = st.sampled_from([RAW_TYPE, DELTA_GZIP_TYPE, "image/webp", "other"])
KEYS = ["chunk_index", "num_frames", "width", "height", "payload", "payload_lengths", "chunk_total_ms", "content"]
MESSAGES = st.builds(
    lambda kind, content_type, rest: pack(rest | {"type": kind, "content_type": content_type}),
    TYPES,
    CONTENT_TYPES,
    st.dictionaries(st.sampled_from(KEYS), VALUES),
)


@settings(deadline=None)  # a loaded machine is no failure
@given(st.lists(st.binary(max_size=200) | MESSAGES, max_size=3))
def test_any_bytes_are_decoded_or_refused(messages):
    """Any message returns frames or raises a ClientError."""
    protocol = ClientProtocol()
    for message in messages:
        with contextlib.suppress(ClientError):
            protocol.receive(message)


def test_text_messages_are_refused():
    """Every message must be binary."""
    with pytest.raises(ProtocolError):
        ClientProtocol().receive("hello")


def test_init_message(tmp_path):
    """Pictures of every form become bytes, URLs stay, None leaves a field out, and the camera is on by default."""
    path = tmp_path / "picture.bin"
    path.write_bytes(b"file")
    for given_frame, start in (
        (b"bytes", b"bytes"),
        (path, b"file"),
        (str(path), b"file"),
        (np.zeros((16, 16, 3), np.uint8), b"\x89PNG"),
    ):
        message = msgspec.msgpack.decode(init_message("p", given_frame, size="64x64", max_chunks=None))
        assert message["first_frame"].startswith(start)
        assert message["size"] == "64x64"
        assert "max_chunks" not in message
        assert message["condition_inputs"] == {"camera_actions": [[]]}
    message = msgspec.msgpack.decode(init_message("p", "data:image/png;base64,AA==", script=None))
    assert message["first_frame"].startswith("data:")
    assert "condition_inputs" not in message
