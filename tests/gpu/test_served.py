"""A server on the accelerator: a session through a real socket, and a device that fails for good."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from lingbot_rt.config import ENDPOINT

from .conftest import DEVICE

pytest.importorskip("prometheus_client")
msgspec = pytest.importorskip("msgspec")
connect = pytest.importorskip("websockets.sync.client").connect

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ieee")]

LIMIT_S = 120
CHUNKS = 3


def test_a_served_session_has_the_engines_frames(gpu_config):
    """Three chunks over a WebSocket are, byte for byte, those that the engine gives without a server."""
    from lingbot_rt.engine.engine import Engine
    from lingbot_rt.offline import play
    from lingbot_rt.session.messages import decode
    from tests.server.conftest import init, running

    message = init(max_chunks=CHUNKS, condition_inputs={"camera_actions": [["w"]] * 9})

    async def serve() -> tuple[list[np.ndarray], list[np.ndarray]]:
        engine = Engine(gpu_config)
        async with running(engine) as server:
            async with asyncio.timeout(LIMIT_S):
                while not engine.status.ready:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            async with server.client(message) as client:
                served = [np.stack((await client.chunk()).frames) for _ in range(CHUNKS)]
                assert (await client.closed())[0] == 1000
            offline = [
                chunk.frames async for chunk in play(engine, gpu_config, decode(msgspec.msgpack.encode(message)))
            ]
        return served, offline

    served, offline = asyncio.run(serve())
    assert [len(frames) for frames in served] == [9, 12, 12]
    for got, expected in zip(served, offline, strict=True):
        assert np.array_equal(got, expected)
        assert got.std() > 1


BROKEN = """
import sys, torch
from lingbot_rt.cli import main
from lingbot_rt.engine import chunk_runner
denoise = chunk_runner.denoise
def broken(forward, *args):
    if forward.start_frame:
        device = forward.condition.device
        torch.zeros(2, device=device)[torch.tensor([10**6], device=device)]
    return denoise(forward, *args)
chunk_runner.denoise = broken
sys.exit(main(sys.argv[1:]))
"""
"""A server whose second chunk reads far outside of a tensor: an error of the device that every later call repeats."""


def test_a_device_that_failed_for_good_ends_the_process(gpu_config, tmp_path):
    """The client gets the reason and close 1011, /health answers 503 with it, and the exit code is 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--model-path", gpu_config.model_path, "--device", DEVICE.type, "--dtype", "float32"]
    command = [sys.executable, "-c", BROKEN, "serve", *flags, "--warmup", "false", "--compile", "false"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for_health(port, 200, process, log)
        first_frame = b"P6 8 8 255\n" + bytes(8 * 8 * 3)
        init = {"type": "init", "prompt": "A street.", "first_frame": first_frame, "size": "64x64"}
        with connect(f"ws://127.0.0.1:{port}{ENDPOINT}", compression=None, max_size=None) as client:
            client.send(msgspec.msgpack.encode(init))
            error = next(message for message in messages_of(client) if message["type"] == "error")
            assert error["code"] == "engine_failed"
            assert "the device failed for good" in wait_for_health(port, 503, process, log)["detail"]
        assert process.wait(LIMIT_S) == 1
    finally:
        process.kill()
        process.wait()


def messages_of(client):
    while True:
        message = msgspec.msgpack.decode(client.recv(LIMIT_S))
        if message["type"] == "frame_batch_header":
            client.recv(LIMIT_S)  # the payload
        yield message


def wait_for_health(port: int, status: int, process: subprocess.Popen, log) -> dict:
    deadline = time.monotonic() + LIMIT_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                got, body = answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                got, body = error.code, json.load(error)
        except OSError:
            got, body = 0, {}
        if got == status:
            return body
        time.sleep(0.02)
