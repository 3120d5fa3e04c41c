"""Init to frames to statistics over a real socket."""

from __future__ import annotations

import numpy as np
import pytest

from tests.server.conftest import event, init, saved, state
from tests.server.fake_engine import FakeEngine, frame


async def test_init_gives_frames_then_stats_then_the_end(serve):
    """A session of two chunks sends 9 and 12 known frames, statistics after each, and closes with 1000."""
    server = await serve()
    async with server.client(init(max_chunks=2)) as client:
        first, second = await client.chunk(), await client.chunk()
        assert await client.closed() == (1000, "generation complete")
    frames = first.frames + second.frames
    assert (len(first.frames), len(second.frames)) == (9, 12)
    plan = server.engine.opened[0]
    for number, pixels in enumerate(frames):
        np.testing.assert_array_equal(pixels, frame(plan, number))
    for index, chunk in enumerate((first, second)):
        assert [header["frame_batch_index"] for header in chunk.headers] == [0, 1, 2]
        assert {header["num_frame_batches"] for header in chunk.headers} == {3}
        assert [header["is_final_frame_batch"] for header in chunk.headers] == [False, False, True]
        assert chunk.stats["chunk_index"] == index
        assert chunk.stats["num_frames"] == len(chunk.frames)
        assert chunk.stats["chunk_total_ms"] > 0
        assert "event_id" not in chunk.headers[0]
    await server.idle()
    assert server.engine.closed == [plan.session_id]


@pytest.mark.parametrize("name", ["raw", "delta-gzip", "webp", "jpeg", None])
async def test_every_transport_carries_the_same_world(serve, name):
    """raw and delta-gzip (also by default) are exact; webp and jpeg come close to the same frames alone."""
    server = await serve()
    # Grey that rises and falls by 6 per column: one frame differs from the next by that.
    ridge = 200 - 6 * np.abs(np.arange(64) - 32)
    picture = saved(np.broadcast_to(ridge[None, :, None], (64, 64, 3)).astype(np.uint8))
    message = init(max_chunks=2, realtime_output_format=name, first_frame=picture)
    async with server.client(message) as client:
        frames = (await client.chunk()).frames + (await client.chunk()).frames
        await client.closed()
    plan = server.engine.opened[0]
    expected = np.stack([frame(plan, number) for number in range(21)]).astype(int)
    errors = np.abs(np.stack(frames).astype(int) - expected).mean(axis=(1, 2, 3))
    others = np.abs(np.stack(frames).astype(int) - np.roll(expected, 1, axis=0)).mean(axis=(1, 2, 3))
    assert errors.max() <= (1 if name in ("webp", "jpeg") else 0)
    assert others.min() > 4


async def test_events_reach_the_next_chunk_and_come_back_in_headers(serve):
    """Keys sent while a chunk runs are sampled by a later one, whose headers and stats carry the event id."""
    server = await serve(FakeEngine(group_s=0.01))
    async with server.client(init()) as client:
        await client.receive()
        await client.send(event("camera_actions", state("w"), event_id=70000))
        while True:
            chunk = await client.chunk()
            if chunk.stats["event_id"] is not None:
                break
    assert {header["event_id"] for header in chunk.headers} == {70000}
    assert chunk.stats["event_latency_ms"] > 0
    plan = server.engine.plans[chunk.stats["chunk_index"]]
    assert plan.relative_poses.shape == (3, 4, 4)
    await server.idle()
