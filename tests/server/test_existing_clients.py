"""Published clients work unchanged: the reference's page, its documented sketches, its checks, JavaScript's libraries.

Also: docs/wire.md names every field.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from lingbot_rt.errors import InvalidEvent, InvalidInit, RequestError
from lingbot_rt.session.controls import parse_event
from lingbot_rt.session.messages import Event, Init, decode
from tests.server.conftest import init, wait_until
from tests.server.fake_engine import CARD, FakeEngine, frame
from tests.server.wire_types import check_old_clients_can_read

SKETCH = """
import msgspec.msgpack
import websocket

ws = websocket.create_connection("ws://127.0.0.1:30000/v1/realtime_video/generate")
ws.send_binary(msgspec.msgpack.encode({
    "type": "init",
    "prompt": "A quiet rainy London alley, stable camera motion.",
    "first_frame": open("reference.jpg", "rb").read(),
    "size": "832x480",
    "fps": 25,
    "num_frames": 9,
    "num_inference_steps": 4,
    "guidance_scale": 1,
    "realtime_output_format": "webp",
    "output_compression": 95,
}))

ws.send_binary(msgspec.msgpack.encode({
    "type": "event",
    "kind": "camera_actions",
    "event_id": 1,
    "payload": {"mode": "state", "transitions": [{"actions": ["w"], "client_ts_ms": 0}]},
}))
"""
"""Copied from the reference's documentation."""


SECOND_SKETCH = (
    SKETCH
    + """
for number, kind, payload in (
    (2, "prompt", "The same alley in snow."),
    (3, "composite_input", {
        "input_types": ["prompt", "camera_actions"],
        "prompt": "The same alley at night.",
        "camera_actions": [["w"], ["w"], []],
    }),
):
    ws.send_binary(msgspec.msgpack.encode({"type": "event", "kind": kind, "event_id": number, "payload": payload}))
"""
)
"""What the sketch of the second model's page sends beyond that."""

READ_ON = """
import sys
done = 0
while done < 9 or newest != LAST_ID:
    message = ws.recv()
    done, newest = done + 1, msgspec.msgpack.decode(message).get("event_id")
    sys.stdout.buffer.write(len(message).to_bytes(4, "big") + message)
ws.close()
"""


@pytest.mark.parametrize(("sketch", "last_id"), [(SKETCH, 1), (SECOND_SKETCH, 3)], ids=["first", "second"])
async def test_the_cookbooks_sketches_work_as_they_stand(serve, tmp_path, sketch, last_id):
    """The documented client gets WebP frames of its size with its newest event id, in types that old clients read."""
    server = await serve(FakeEngine(group_s=0.02))
    Image.fromarray(np.full((480, 832, 3), 90, np.uint8)).save(tmp_path / "reference.jpg")
    code = sketch.replace("30000", str(server.port)) + READ_ON.replace("LAST_ID", str(last_id))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0
    messages = []
    while output:
        size = int.from_bytes(output[:4], "big")
        data, output = output[4 : 4 + size], output[4 + size :]
        check_old_clients_can_read(data)
        messages.append(msgspec.msgpack.decode(data))
    assert {message["type"] for message in messages} == {"frame_batch", "chunk_stats"}
    headers = [message for message in messages if message["type"] == "frame_batch"]
    assert {header["content_type"] for header in headers} == {"image/webp"}
    assert {(header["width"], header["height"]) for header in headers} == {(832, 480)}
    assert messages[-1]["event_id"] == last_id
    await server.idle()


PACKED = json.loads((Path(__file__).parent / "client_messages" / "messages.json").read_text())
READ = {name: [base64.b64decode(text) for text in texts] for name, texts in PACKED["read"].items()}
"""What each library packs of one init and four events. ``client_messages/make.mjs`` made it."""

PAGE_INIT = base64.b64decode(PACKED["page_init"])


@pytest.mark.parametrize("library", READ)
def test_every_library_says_the_same(library):
    """Whole numbers as float64, undefined as an extension, long maps of few keys, strings and bytes of every size."""
    first, *events = (decode(data) for data in READ[library])
    assert isinstance(first, Init)
    assert first == decode(READ["page"][0])
    assert (first.seed, first.num_inference_steps, first.frame_interpolation_scale) == (70000, None, 0.5)
    assert first.first_frame.startswith(b"\x89PNG")
    assert first.prompt.endswith("é 雪 🙂. ")
    for event, other in zip(events, READ["page"][1:], strict=True):
        assert isinstance(event, Event)
        assert event == decode(other)
        assert parse_event(event.kind, event.payload)
    assert [event.event_id for event in events] == [1, 300, 70000, 70001]
    assert events[0].payload["transitions"][0]["client_ts_ms"] == 1764345600123.5


REFUSED = {
    "msgpackr, records": (None, r"a record of msgpackr; pack with useRecords false"),
    "msgpackr, shared structures": (None, r"a record of msgpackr without its keys \(pack with useRecords false\)"),
    "msgpackr, bundleStrings": (None, "bundled strings of msgpackr; pack with bundleStrings false"),
    "msgpackr, moreTypes": ("first_frame", "a typed array of msgpackr; pack with moreTypes false"),
    "msgpack-lite, Uint8Array": ("first_frame", "a Uint8Array of msgpack-lite; send a Buffer"),
    "msgpack-lite, ArrayBuffer": ("first_frame", "an ArrayBuffer of msgpack-lite; send a Buffer"),
    "msgpackr, Date": ("camera_actions.transitions[0].client_ts_ms", "a time; send milliseconds as a number"),
    "msgpack-lite, Date": ("camera_actions.transitions[0].client_ts_ms", "a Date of msgpack-lite; send milliseconds"),
    "@msgpack/msgpack, Date": ("camera_actions.transitions[0].client_ts_ms", "a time; send milliseconds as a number"),
}


@pytest.mark.parametrize("case", PACKED["refused"])
def test_what_only_one_library_reads_is_refused_with_the_way_out(case):
    """The error names the library's option or the type to send instead."""
    field, text = REFUSED[case]
    with pytest.raises(RequestError, match=text) as refused:
        message = decode(base64.b64decode(PACKED["refused"][case]))
        assert isinstance(message, Event)
        parse_event(message.kind, message.payload)
    assert refused.value.field == field
    assert isinstance(refused.value, InvalidEvent if "Date" in case else InvalidInit)
    assert len(str(refused.value)) < 250


async def test_every_library_plays_the_same_session(serve):
    """One session each: the same plans, and nothing but the messages that old clients know."""
    server = await serve(FakeEngine())
    played = []
    for messages in READ.values():
        server.engine.may_open.clear()
        server.engine.plans.clear()
        async with server.client() as client:
            for data in messages:
                await client.socket.send(data)
            # They count from the first chunk, so that all sessions are planned alike.
            await wait_until(lambda: _events_received(server.service) == 4)
            server.engine.may_open.set()
            chunks = [await client.chunk() for _ in range(5)]
            assert await client.closed() == (1000, "generation complete")
            assert client.seen == []
        assert {header["content_type"] for chunk in chunks for header in chunk.headers} == {"image/webp"}
        assert [chunk.stats["event_id"] for chunk in chunks] == [70001, 70000, 70000, 70000, 70000]
        plans = server.engine.plans
        poses = np.stack([plan.relative_poses for plan in plans])
        assert np.allclose(poses[0, :, 2, 3], [0, 1, 1])
        played.append(([plan.prompt for plan in plans], poses.tolist(), plans[0].intrinsics.tolist()))
        await server.idle()
    assert played[0][0][0].startswith("A quiet street in the rain")
    assert set(played[0][0][1:]) == {"Night."}
    assert all(each == played[0] for each in played)


def _events_received(service) -> int:
    sessions = [connection._serving.session for connection in service.connections]
    return sessions[0]._queue._num_received if sessions and sessions[0] else 0


@pytest.mark.parametrize(
    ("options", "content_type"),
    [({}, "application/x-raw-rgb-delta-gzip"), ({"default_output_format": "raw"}, "application/x-raw-rgb")],
)
async def test_the_page_with_the_servers_default_format(serve, options, content_type):
    """The page then names no format: lossless delta-gzip as documented, raw RGB if the operator chose that."""
    server = await serve(FakeEngine(), **options)
    async with server.client() as client:
        await client.socket.send(PAGE_INIT)
        chunks = [await client.chunk() for _ in range(3)]
        assert await client.closed() == (1000, "generation complete")
        assert client.seen == []
    (opened,) = server.engine.opened
    frames = [pixels for chunk in chunks for pixels in chunk.frames]
    assert {header["content_type"] for chunk in chunks for header in chunk.headers} == {content_type}
    assert np.array_equal(frames, [frame(opened, number) for number in range(33)])


async def test_the_references_consistency_check(serve):
    """A client that names model and length, sends an event before the first frame and stops at any unknown type.

    It holds every chunk to be complete once its last batch came, and its statistics to have every time.
    """
    server = await serve(FakeEngine())
    fields = init(model=CARD.model_id, seconds=5, fps=24, max_chunks=3)
    before = {"type": "event", "kind": "camera_actions", "payload": [["w"]] * 9}
    times = ("request_prepare_ms", "scheduler_forward_ms", "raw_payload_build_ms", "raw_write_ms", "ws_write_ms")
    async with server.client(fields, before) as client:
        complete, counted = [], []
        while len(complete) < 3 or len(counted) < 3:
            message, payload = await client.receive()
            assert message["type"] in ("frame_batch", "frame_batch_header", "chunk_stats")
            if message["type"] == "chunk_stats":
                assert all(float(message[name]) >= 0 for name in (*times, "chunk_total_ms"))
                counted.append(message["num_frames"])
                continue
            size = message["num_frames"] * message["height"] * message["width"] * message["channels"]
            assert len(payload) == message["num_frames"] * message["bytes_per_frame"] == size
            complete += [message["chunk_index"]] * message["is_final_frame_batch"]
    assert complete == [0, 1, 2]
    assert counted == [9, 12, 12]
    await server.idle()


def test_the_field_tables_name_every_field():
    """docs/wire.md has a row for each field of init, resume and event, and for no other."""
    from lingbot_rt.session import messages

    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    section = text.partition("## init")[2]
    init, _, rest = section.partition("## event")
    event = rest.partition("| kind |")[0]
    resume = text.partition("### An init that resumes")[2].partition("\n### ")[0]
    row = re.compile(r"^\| `(\w+)`", re.MULTILINE)
    assert set(row.findall(resume)) == set(messages.Resume.__struct_fields__) | {"type"}
    assert set(row.findall(init)) == set(messages.Init.__struct_fields__) | {"type"}
    assert set(row.findall(event)) == set(messages.Event.__struct_fields__) | {"type"}
