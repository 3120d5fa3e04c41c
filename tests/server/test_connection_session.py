"""A connection in its session: events, batches, statistics and pacing over a real socket."""

from __future__ import annotations

import threading
import time

import msgspec

from lingbot_rt.recording.record_file import read_record
from lingbot_rt.recording.session_record import start_record
from lingbot_rt.session.session import Session
from lingbot_rt.transport.pacing import Pacer
from tests.server.conftest import LIMIT_S, event, init, state, wait_until
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds per latent frame: slow enough to meet a chunk in the middle."""


async def test_bad_events_change_nothing(serve):
    """A bad event gets its error; prompt and camera of the following chunks are as before."""
    server = await serve(FakeEngine(group_s=SLOW))
    bad = [
        event("dance"),
        event("prompt", ""),
        event("camera_actions", [["w"], ["x"]]),
        event("composite_input", {"input_types": ["prompt", "camera_actions"], "prompt": "New.", "camera_actions": 3}),
        event("pause"),
        {"type": "event"},
        init(),
    ]
    async with server.client(init()) as client:
        for message in bad:
            await client.send(message)
            assert (await client.until("error"))["content"].startswith("invalid ")
        await client.chunk()
        await client.chunk()
    assert {plan.prompt for plan in server.engine.plans} == {"A quiet street."}
    assert all(plan.relative_poses is None for plan in server.engine.plans)


async def test_odd_values_under_unread_keys_break_neither_session_nor_record(serve, tmp_path):
    """An extension beside what is read, in init and event: both are served, the record says what it lacks."""
    server = await serve(FakeEngine(group_s=SLOW), record_dir=str(tmp_path))
    extension = msgspec.msgpack.Ext(5, b"x")
    script = {"camera_actions": [["w"]], "unused": extension}
    async with server.client(init(condition_inputs=script)) as client:
        await client.receive()
        await client.send(event("camera_actions", state("d") | {"unused": extension}, 7))
        while (await client.chunk()).stats["event_id"] != 7:
            pass
    await server.idle()
    (folder,) = tmp_path.iterdir()
    record = read_record(folder)
    assert record.session.init["condition_inputs"] == {"camera_actions": [["w"]]}
    assert [
        line.startswith("condition_inputs.unused: a MessagePack extension") for line in record.session.left_out
    ] == [True]
    assert [e.event_id for chunk in record.chunks for e in chunk.events] == [7]
    assert record.end is not None


async def test_a_record_that_begins_while_the_client_leaves_is_closed(serve, tmp_path, monkeypatch):
    """The session does not live to see it: whoever waited for it closes it."""
    begun, may_start, recorders = threading.Event(), threading.Event(), []

    def slow(*args):
        begun.set()
        may_start.wait(LIMIT_S)
        recorders.append(start_record(*args))
        return recorders[0]

    monkeypatch.setattr("lingbot_rt.server.serving.start_record", slow)
    server = await serve(record_dir=str(tmp_path))
    async with server.client(init()):
        await wait_until(begun.is_set)
        (connection,) = server.service.connections
    await wait_until(lambda: connection._serving.close is not None)
    may_start.set()
    await server.idle()
    await wait_until(lambda: bool(recorders))
    (folder,) = tmp_path.iterdir()
    await wait_until(lambda: read_record(folder).end is not None)


async def test_an_unexpected_error_is_told_without_its_text(serve, monkeypatch, caplog):
    """The client gets the kind and where to look; paths and objects stay in the log."""

    def fail(*args):
        raise KeyError("/srv/secret <object at 0x7f00>")

    monkeypatch.setattr(Session, "next_chunk", fail)
    server = await serve()
    async with server.client(init()) as client:
        error = await client.error()
        assert (await client.closed())[0] == 1011
    assert "KeyError; the server's log has more" in error["content"]
    assert "/srv" not in error["content"]
    assert "/srv/secret" in caplog.text


async def test_a_prompt_event_is_in_force_from_the_next_chunk(serve):
    """The chunk that carries the event's id runs with the new prompt, the ones before with the old."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init()) as client:
        await client.receive()
        await client.send(event("prompt", "A river.", 5))
        while (chunk := await client.chunk()).stats["event_id"] is None:
            pass
    plans = server.engine.plans
    index = chunk.stats["chunk_index"]
    assert index >= 1
    assert [plan.prompt for plan in plans[: index + 1]] == ["A quiet street."] * index + ["A river."]


async def test_a_large_batch_is_followed_by_its_payload_and_nothing_else(serve):
    """Errors asked for in the middle of large two-message batches never come between header and payload."""
    server = await serve(FakeEngine(group_s=0.002))
    async with server.client(init(size="256x160", max_chunks=8)) as client:
        for _ in range(40):
            await client.send(event("dance"))
        frames = sum([len((await client.chunk()).frames) for _ in range(8)])
        await client.closed()
    assert frames == 9 + 7 * 12
    assert [message["type"] for message in client.seen] == ["error"] * len(client.seen)
    assert client.seen


async def test_an_event_sent_with_the_init_counts(serve):
    """Clients send their first keys right behind the init: they are in the first chunk."""
    server = await serve()
    server.engine.may_open.clear()
    messages = init(protocol_extensions=["control_ack"]), event("camera_actions", state("w"), 1)
    async with server.client(*messages) as client:
        assert (await client.until("control_ack"))["state"] == "received"
        server.engine.may_open.set()
        chunk = await client.chunk()
    assert chunk.stats["event_id"] == 1
    assert server.engine.plans[0].relative_poses is not None


async def test_statistics_add_up_to_the_wall_time(serve):
    """The chunk times of a session follow one another: their sum is the time that passed, no more and no less."""
    server = await serve(FakeEngine(group_s=0.005))
    started = time.monotonic()
    async with server.client(init(max_chunks=6, profile=True)) as client:
        stats = [(await client.chunk()).stats for _ in range(6)]
        passed_ms = 1000 * (time.monotonic() - started)
    generated_at = server.engine.emitted_at
    total_ms = sum(entry["chunk_total_ms"] for entry in stats)
    rounding_ms = 6
    assert 1000 * (generated_at[-1] - generated_at[0]) - rounding_ms <= total_ms <= passed_ms + rounding_ms
    for entry in stats:
        assert entry["scheduler_forward_ms"] >= 15  # three latent frames of 5 ms
        assert entry["window_frames"] == 9
        assert set(entry["stages"]) == {"prepare", "denoise", "context"}


async def test_pacing_holds_a_fast_engine_back(serve, monkeypatch):
    """With realtime_output_pacing frames leave no faster than fps, and what each batch waited is in the statistics."""
    until_due = Pacer.until_due

    async def counted(pacer, num_frames, event_id):
        return 10_000 + await until_due(pacer, num_frames, event_id)

    monkeypatch.setattr(Pacer, "until_due", counted)
    server = await serve()
    started = time.monotonic()
    async with server.client(init(max_chunks=2, fps=100, realtime_output_pacing=True)) as client:
        stats = [(await client.chunk()).stats for _ in range(2)]
    # 21 frames, of which the last four may leave when 17 have been shown.
    assert time.monotonic() - started >= 0.17
    assert [entry["pace_wait_ms"] // 10_000 for entry in stats] == [3, 3]


async def test_an_event_is_not_held_up_by_pacing(serve, monkeypatch):
    """A key pressed while paced frames wait is in the next frames at once: neither the generator's wait for the right
    moment nor the older frames' due times, an hour away, stand before it."""
    monkeypatch.setattr("lingbot_rt.server.stream.Pacer", lambda fps, chunk_frames: Pacer(0.001, chunk_frames))
    server = await serve()
    async with server.client(init(realtime_output_pacing=True)) as client:
        await client.receive()
        await client.send(event("camera_actions", [["w"]], event_id=9))
        while (await client.receive())[0].get("event_id") != 9:
            pass
