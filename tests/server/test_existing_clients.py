"""The client that the reference documents works unchanged, and docs/wire.md names every field."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from tests.server.fake_engine import FakeEngine
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


READ_ON = """
import sys
for _ in range(9):
    message = ws.recv()
    sys.stdout.buffer.write(len(message).to_bytes(4, "big") + message)
ws.close()
"""


async def test_the_cookbooks_sketch_works_as_it_stands(serve, tmp_path):
    """The documented client gets WebP frames of its size with its event id, in types that existing clients read."""
    server = await serve(FakeEngine(group_s=0.02))
    Image.fromarray(np.full((480, 832, 3), 90, np.uint8)).save(tmp_path / "reference.jpg")
    code = SKETCH.replace("30000", str(server.port)) + READ_ON
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
    assert headers[-1]["event_id"] == 1
    await server.idle()


def test_the_field_tables_name_every_field():
    """docs/wire.md has a row for each field of init and event, and for no other."""
    from lingbot_rt.session import messages

    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    section = text.partition("## init")[2]
    init, _, rest = section.partition("## event")
    event = rest.partition("| kind |")[0]
    row = re.compile(r"^\| `(\w+)`", re.MULTILINE)
    assert set(row.findall(init)) == set(messages.Init.__struct_fields__) | {"type"}
    assert set(row.findall(event)) == set(messages.Event.__struct_fields__) | {"type"}
