"""A real engine behind a real socket: a session that is interrupted in any way has the frames of one that is not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.engine import Engine
from tests.server.conftest import Client, Running, event, init, running, state, wait_until

CHUNKS = 5
FORMATS = ["raw", "delta-gzip", "webp", "jpeg"]
ASKED = {
    "num_inference_steps": 1,
    "realtime_causal_kv_cache_num_frames": 9,
    "max_chunks": CHUNKS,
    "protocol_extensions": ["session", "history", "pause", "pinned_events"],
    "condition_inputs": {"camera_actions": [["w"]] * 3},
    "pinned_events": [
        {"chunk": 1, "kind": "camera_actions", "payload": state("w", "l")},
        {"chunk": 3, "kind": "prompt", "payload": "A storm at sea."},
    ],
}


@pytest.fixture(scope="module")
def config(golden) -> ServeConfig:
    model = str(golden("e2e/model"))
    return ServeConfig(model_path=model, device="cpu", dtype="float32", warmup=False, snapshot_kv=True)


@pytest.fixture
async def server(config) -> AsyncIterator[Running]:
    """It keeps two sessions at a time. The window slides after the third chunk."""
    async with running(Engine(config), max_sessions=2, model_path=config.model_path) as it:
        await wait_until(lambda: it.engine.status.ready)
        yield it


async def frames_of(client: Client, chunks: int = CHUNKS) -> list[np.ndarray]:
    frames: list[np.ndarray] = []
    for _ in range(chunks):
        frames += (await client.chunk()).frames
    return frames


def assert_same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [pixels.tobytes() for pixels in got] == [pixels.tobytes() for pixels in expected]


@pytest.mark.parametrize("name", FORMATS)
async def test_frames_are_those_of_a_session_left_alone(server, name):
    """Of one that shares the engine, one whose line is lost, one that goes back, and one that goes on from its file."""
    asked = init(**ASKED, realtime_output_format=name)
    async with server.client(asked) as client:
        expected = await frames_of(client)
    assert len(expected) == 9 + 12 * (CHUNKS - 1)
    assert np.abs(expected[0].astype(int) - expected[-1]).mean() > 1

    async with server.client(asked) as one, server.client(init(**ASKED | {"seed": 7})) as other:
        shared, others = [], []
        for _ in range(CHUNKS):
            shared += (await one.chunk()).frames
            others += (await other.chunk()).frames
    assert_same(shared, expected)
    assert not np.array_equal(others[-1], expected[-1])

    async with server.client(asked) as client:
        token = (await client.until("session"))["resume_token"]
        before = await frames_of(client, 2)
        client.socket.transport.abort()
    got = {"received_chunk": 1, "received_frames": 12}
    async with server.client({"type": "init", "resume": token} | got) as client:
        session = await client.until("session")
        assert (session["resumed"], session["chunk_index"], session["exact"]) == (True, 2, True)
        assert_same(before + await frames_of(client, CHUNKS - 2), expected)

    async with server.client(asked | {"max_chunks": None}) as client:
        first = await frames_of(client, 4)
        await client.send(event("rewind", {"chunk": 2}, 1))
        while (message := await client.receive())[0]["type"] != "rewound":
            assert message[0]["type"] != "error", message
        assert (message[0]["chunk_index"], message[0]["exact"]) == (2, True)
        assert_same(first[:21] + await frames_of(client, CHUNKS - 2), expected)
        await client.send(event("pause", event_id=2))
        await client.send(event("rewind", {"chunk": 4}, 3))
        await client.send(event("save", event_id=4))
        while (message := await client.receive())[0]["type"] != "world":
            pass
    async with server.client({"type": "init", "resume": message[1], "realtime_output_format": name}) as client:
        assert_same(await frames_of(client, 1), expected[-12:])
