"""A world that was cut off, gone back in or carried over to another server has the pixels it would have had."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.engine import Engine
from lingbot_rt.server import app, connection
from lingbot_rt.session.messages import Init
from lingbot_rt.session.settings import resolve
from tests.server.conftest import Client, Running, event, init, running, state, wait_until
from tests.server.test_kept_worlds import Player, lost, resume

CHUNKS = 4
FRAMES = 9 + 12 * (CHUNKS - 1)
KEYS = ["w", "l", "wl", "", "s"]


@pytest.fixture(autouse=True)
def _time_to_finish(monkeypatch):
    """A server that stops sends the chunk in work, on a busy machine too."""
    monkeypatch.setattr(connection, "FINISH_S", 30.0)
    monkeypatch.setattr(app, "SHUTDOWN_LIMIT_S", 60.0)


@pytest.fixture
def walk(golden) -> dict[str, Any]:
    """A session of a few chunks whose keys and prompts do not depend on timing; its window slides."""
    pinned = [
        {"chunk": index, "kind": "camera_actions", "payload": state(*keys), "event_id": index}
        for index, keys in enumerate(KEYS)
    ]
    pinned.append({"chunk": 2, "kind": "prompt", "payload": "Snow."})
    return init(
        first_frame=golden("e2e/first_frame.png").read_bytes(),
        num_inference_steps=1,
        realtime_causal_kv_cache_num_frames=6,
        pinned_events=pinned,
        protocol_extensions=["session", "queue", "pinned_events", "history", "pause"],
        max_chunks=CHUNKS,
    )


@asynccontextmanager
async def served(golden, **options: Any) -> AsyncIterator[Running]:
    """A server of the golden checkpoint in this process."""
    options |= {"model_path": str(golden("e2e/model")), "device": "cpu", "dtype": "float32", "warmup": False}
    engine: Any = Engine(ServeConfig(**options))
    async with running(engine, **options) as server:
        await wait_until(lambda: engine.status.ready)
        # The first session of a process imports and plans for seconds: not within a client's time.
        settings = resolve(Init(prompt="Warm.", first_frame=b"", size="64x64"), engine.model_info, ServeConfig())
        await engine.open(settings.session_plan("warm", np.zeros((64, 64, 3), np.uint8)))
        await engine.close("warm")
        yield server


async def to_the_end(client: Client, player: Player) -> None:
    with suppress(ConnectionClosed):
        while True:
            await player.take(client)
    assert client.socket.close_code == 1000


async def whole(server: Running, walk: dict[str, Any], **fields: Any) -> np.ndarray:
    """The frames of the session without an interruption, [n, H, W, 3]."""
    player = Player()
    async with server.client(walk | fields) as client:
        await to_the_end(client, player)
    assert len(player.frames) == FRAMES
    return np.stack(player.frames)


async def test_a_cut_line_changes_no_pixel(golden, walk):
    """In every transport, cut at any frame, and with another session in between."""
    async with served(golden) as server:
        for name in ("raw", "delta-gzip", "webp", "jpeg"):
            expected, player = await whole(server, walk, realtime_output_format=name), Player()
            async with lost(server, walk | {"realtime_output_format": name}) as client:
                token = (await client.until("session"))["resume_token"]
                await player.take_frames(client, 5)
            if name == "raw":
                async with server.client(walk | {"max_chunks": 1}) as other:
                    await other.closed()
            async with lost(server, resume(token, **player.received)) as client:
                assert (await client.until("session"))["exact"]
                await player.take_frames(client, 30)
            async with server.client(resume(token, **player.received)) as client:
                await client.until("session")
                await to_the_end(client, player)
            np.testing.assert_array_equal(np.stack(player.frames), expected, name)


async def test_going_back_and_another_server_change_no_pixel_with_snapshot_kv(golden, walk, tmp_path: Path):
    """A chunk that comes again is the same; so is one that another process makes from the file of a stopped one."""
    options = {"snapshot_kv": True, "park_dir": str(tmp_path)}
    player = Player()
    async with served(golden, **options) as server:
        expected = await whole(server, walk)
        async with server.client(walk | {"max_chunks": 99}) as client:
            token = (await client.until("session"))["resume_token"]
            await player.take_frames(client, 9 + 12 * 2)
            await client.send(event("rewind", {"chunk": 1}))
            message = await client.until("rewound")
            assert (message["chunk_index"], message["exact"]) == (1, True)
            player = Player()
            await player.take_frames(client, 13)
            server.server.should_exit = True
            with suppress(ConnectionClosed):
                while True:
                    await player.take(client)
            assert client.socket.close_code == 1001
    async with (
        served(golden, **options) as server,
        server.client(resume(token, **player.received, max_chunks=1)) as client,
    ):
        message = await client.until("session")
        assert (message["resumed"], message["exact"], message["chunk_index"]) == (True, True, player.chunk + 1)
        await to_the_end(client, player)
    begin = 9
    frames = np.stack(player.frames)[: FRAMES - begin]
    np.testing.assert_array_equal(frames, expected[begin : begin + len(frames)])
