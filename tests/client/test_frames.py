"""Decoding of frame batches, against recorded messages."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lingbot_rt.client.frames import FrameDecoder
from lingbot_rt.errors import ProtocolError
from lingbot_rt.session.messages import DELTA_GZIP_TYPE, RAW_TYPE


def header(content_type: str, frames: int, width: int, height: int, **more: object) -> dict:
    return {
        "chunk_index": 0,
        "content_type": content_type,
        "num_frames": frames,
        "width": width,
        "height": height,
    } | more


def test_recorded_delta_messages_decode(golden):
    """Recorded delta-gzip messages decode to the frames they were made from, across chunks and key frames."""
    record = json.loads(golden("transport/delta_gzip.json").read_text())
    originals = [base64.b64decode(frame) for frame in record["frames_b64"]]
    decoder = FrameDecoder()
    indices = []
    for message in record["messages"]:
        for number, frame in zip(
            message["frames"],
            decoder.decode(message["header"], base64.b64decode(message["payload_b64"])),
            strict=True,
        ):
            assert frame.pixels.tobytes() == originals[number]
            assert frame.event_id == message["header"].get("event_id")
            assert frame.chunk_index == message["header"]["chunk_index"]
            indices.append(frame.index)
    assert indices == list(range(len(indices)))


def test_recorded_raw_messages_decode(golden):
    """Recorded raw messages decode to the bytes of their payload."""
    seen = 0
    for case in json.loads(golden("transport/frame_batch_cases.json").read_text())["cases"]:
        for message in case["messages"]:
            if "payload_sha256" in message and "msgpack_b64" in message and message["form"] == "one_message":
                fields = msgspec.msgpack.decode(base64.b64decode(message["msgpack_b64"]))
                if len(fields["payload"]) != 3 * fields["num_frames"] * fields.get("width", 0) * fields.get(
                    "height", 0
                ):
                    continue  # recorded with made-up sizes
                frames = FrameDecoder().decode(fields, fields["payload"])
                joined = b"".join(frame.pixels.tobytes() for frame in frames)
                assert hashlib.sha256(joined).hexdigest() == message["payload_sha256"]
                assert len(frames) == fields["num_frames"]
                seen += 1
    assert seen


@settings(deadline=None)  # a loaded machine is no failure
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6))
def test_delta_chains_of_any_shape(seed, batches):
    """XOR chains of any batch lengths and key frames decode to the original frames."""
    random = np.random.default_rng(seed)
    decoder = FrameDecoder()
    previous = None
    for count, key in batches:
        frames = random.integers(0, 256, (count, 2, 3, 3), np.uint8)
        fields = header(DELTA_GZIP_TYPE, count, 3, 2)
        reference = np.zeros((2, 3, 3), np.uint8)
        if previous is not None and not key:
            fields["delta_reference"] = "previous-frame"
            reference = previous
        deltas = frames ^ np.concatenate([reference[None], frames[:-1]])
        got = decoder.decode(fields, gzip.compress(deltas.tobytes()))
        np.testing.assert_array_equal(np.stack([frame.pixels for frame in got]), frames)
        previous = frames[-1]


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_encoded_pictures(kind):
    """payload_lengths splits a payload into pictures [H, W, 3]."""
    pictures = []
    for grey in (20, 200):
        file = io.BytesIO()
        Image.new("RGB", (32, 16), (grey, grey, grey)).save(file, kind)
        pictures.append(file.getvalue())
    fields = header(f"image/{kind}", 2, 32, 16, payload_lengths=[len(picture) for picture in pictures])
    frames = FrameDecoder().decode(fields, b"".join(pictures))
    assert [frame.pixels.shape for frame in frames] == [(16, 32, 3)] * 2
    assert abs(int(frames[0].pixels.mean()) - 20) <= 2
    assert abs(int(frames[1].pixels.mean()) - 200) <= 2


@pytest.mark.parametrize(
    ("fields", "payload"),
    [
        (header(RAW_TYPE, 2, 4, 4), b"x" * 95),
        (header(DELTA_GZIP_TYPE, 1, 4, 4), b"no gzip at all"),
        (header(DELTA_GZIP_TYPE, 1, 4, 4), gzip.compress(bytes(10**6), mtime=0)),
        (header(DELTA_GZIP_TYPE, 1, 4, 4), gzip.compress(bytes(47), mtime=0)),
        (header(DELTA_GZIP_TYPE, 1, 4, 4, delta_reference="previous-frame"), gzip.compress(bytes(48), mtime=0)),
        (header("image/webp", 1, 4, 4, payload_lengths=[5]), b"xxxxx"),
        (header("image/webp", 1, 4, 4, payload_lengths=[4]), b"xxxxx"),
        (header("video/ogg", 1, 4, 4), b""),
        ({"content_type": RAW_TYPE, "num_frames": 0, "width": 1}, b""),
    ],
)
def test_broken_batches_are_named(fields, payload):
    """A payload that does not fit its header raises ProtocolError, and no other exception."""
    with pytest.raises(ProtocolError):
        FrameDecoder().decode(fields, payload)


@pytest.mark.parametrize(
    ("changes", "payload", "named"),
    [
        ({"num_frames": "1"}, bytes(6), "num_frames '1'"),
        ({"height": -1}, bytes(6), "height -1"),
        ({"width": None}, bytes(6), "width None"),
        ({"event_id": "x"}, bytes(6), "event_id 'x'"),
        ({"content_type": "text/html"}, bytes(6), "content_type 'text/html'"),
        ({"content_type": "image/webp", "payload_lengths": [6]}, b"<html>", "no valid image/webp"),
        ({"content_type": "image/webp", "payload_lengths": "6"}, b"<html>", "payload_lengths '6'"),
        ({"content_type": "application/x-raw-rgb-delta-gzip", "width": 2**62}, b"x", "damaged"),
        ({}, None, "payload of type NoneType"),
    ],
)
def test_a_wrong_batch_names_its_field(changes, payload, named):
    """The field and its value, and no object of this program."""
    header = {"chunk_index": 0, "content_type": "application/x-raw-rgb", "num_frames": 1, "height": 1, "width": 2}
    with pytest.raises(ProtocolError) as caught:
        FrameDecoder().decode(header | changes, payload)
    assert named in str(caught.value)
    assert "object at" not in str(caught.value)
