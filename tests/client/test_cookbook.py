"""The public cookbook's client, unchanged, against a served model."""

from __future__ import annotations

import subprocess
import sys

from PIL import Image

from tests.e2e.served import running

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

READER = """
while True:
    message = msgspec.msgpack.decode(ws.recv())
    if message["type"] == "frame_batch_header":
        message["payload"] = ws.recv()
    assert message["type"] != "error", message["content"]
    if "payload" in message and message.get("event_id") == 1:
        print(message["width"], message["height"], message["payload"][:4])
        break
ws.close()
"""


def test_the_cookbook_client_works_as_it_stands(golden, tmp_path):
    """It gets frames of the size and format it asked for, and they carry its key press's event id."""
    Image.new("RGB", (320, 200), (90, 120, 150)).save(tmp_path / "reference.jpg")
    model = str(golden("e2e/model"))
    with running(tmp_path, "--model-path", model, "--device", "cpu", "--warmup", "false") as server:
        program = SKETCH.replace(":30000", f":{server.port}") + READER
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.stdout.split() == ["832", "480", "b'RIFF'"], done.stderr
