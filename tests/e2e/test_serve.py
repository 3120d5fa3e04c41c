"""End to end: a server process, a real socket, and the reference's frames."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.e2e.served import WireClient, get_json, running, wire

SESSIONS = ["A1_script", "A2_no_actions", "A3_prompt_event", "A4_sink_window"]


def psnr(got: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((got.astype(np.float64) - expected) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def first_frame(golden) -> bytes:
    return golden("e2e/first_frame.png").read_bytes()


@pytest.fixture
def init(first_frame) -> dict:
    """An init of a small session without max_chunks."""
    return {
        "type": "init",
        "prompt": "A quiet street.",
        "first_frame": first_frame,
        "size": "64x64",
        "fps": 16,
        "num_frames": 9,
        "realtime_output_format": "raw",
    }


@pytest.mark.parametrize("transport", ["raw", "omit"])
@pytest.mark.parametrize("name", SESSIONS)
def test_golden_sessions_over_the_wire(golden_server, golden, first_frame, name, transport):
    """Frames, event ids and chunk lengths of each golden session equal the reference's."""
    record = json.loads(golden(f"e2e/{name}/session.json").read_text())
    if transport not in record["plays"]:
        pytest.skip(f"{name} is recorded for {record['plays']} only")
    with np.load(golden(f"e2e/{name}/frames.npz")) as stored:
        arrays = dict(stored)
    message = record["init"] | {"first_frame": first_frame}
    if transport == "raw":
        message["realtime_output_format"] = "raw"
    received = []
    with wire(golden_server, message) as client:
        for index in range(len(record["frames_per_chunk"])):
            received.append(client.chunk())
            for entry in record["events"]:
                if entry["after_chunk"] == index:
                    client.send(entry["event"])
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
    assert closed.value.rcvd.code == 1000
    assert closed.value.rcvd.reason == "generation complete"
    assert [len(chunk.frames) for chunk in received] == record["frames_per_chunk"]

    ids = [chunk.event_ids[-1] for chunk in received]
    expected = next(a for a in record["alternatives"] if a["event_id"] == ids)
    for chunk, array in zip(received, expected["chunks"], strict=True):
        frames = np.stack(chunk.frames)
        assert np.abs(frames.astype(int) - arrays[array]).max() <= 3
        assert psnr(frames, arrays[array]) >= 45
        assert chunk.stats["chunk_total_ms"] > 0
        assert chunk.stats["num_frames"] == len(frames)


def test_sessions_dropped_at_random_moments_leave_nothing(golden_server, init):
    """200 sessions are dropped before, during and after their first chunks: memory stays flat, the next one works."""
    random_ = random.Random(7)
    before, short = 0.0, init | {"num_inference_steps": 1}
    for number in range(200):
        with connect(golden_server.ws, max_size=None, compression=None) as socket:
            client = WireClient(socket)
            moment = random_.random()
            if moment > 0.1:
                client.send(short)
            if moment > 0.4:
                for _ in range(random_.randrange(1, 4)):
                    client.receive()
            if moment > 0.9:
                socket.socket.close()
        if number == 49:
            before = golden_server.resident_mib()
    assert golden_server.resident_mib() <= before * 1.05
    with wire(golden_server, init | {"max_chunks": 2}) as client:
        assert len(client.chunk().frames) == 9
        assert len(client.chunk().frames) == 12


def test_a_reload_gets_the_slot_of_its_own_old_socket(golden_server, init):
    """A client that reconnects while its old session is in the middle of a chunk is served."""
    for _ in range(5):
        with wire(golden_server, init) as old:
            old.receive()
        with wire(golden_server, init) as new:
            assert len(new.chunk().frames) == 9


def test_models_and_health(golden_server):
    """/v1/models lists the served model, and /health is 200."""
    status, models = get_json(f"{golden_server.http}/v1/models")
    assert status == 200
    assert models["object"] == "list"
    assert models["data"][0]["id"] == "model"
    assert get_json(f"{golden_server.http}/health")[0] == 200
    assert get_json(f"{golden_server.http}/v1/models/nobody")[0] == 404


def test_ctrl_c_ends_the_session_with_an_error(golden, init, tmp_path):
    """After SIGINT the client gets an error and close 1001, and the process exits with code 0."""
    flags = ("--model-path", str(golden("e2e/model")), "--device", "cpu", "--dtype", "float32", "--warmup", "false")
    with running(tmp_path, *flags, is_plain=True) as server:
        with wire(server, init) as client:
            client.chunk()
            server.process.send_signal(2)
            messages = []
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    messages.append(client.receive()[0])
        assert closed.value.rcvd.code == 1001
        assert messages[-1]["type"] == "error", server.log.read_text()
        assert server.process.wait(10) == 0
