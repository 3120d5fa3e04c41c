"""Worlds that outlive their connection: parked and resumed, gone back in, saved and loaded, written to disk."""

from __future__ import annotations

import asyncio
import re
import stat
import threading
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save
from websockets.exceptions import ConnectionClosed

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError, EngineFailed
from lingbot_rt.recording.record_file import read_record
from lingbot_rt.server import app, connection
from tests.server.conftest import LIMIT_S, Client, Running, event, init, running, state, wait_until
from tests.server.fake_engine import FakeEngine, frame, frames_before

SLOW = 0.01
"""Seconds per latent frame: the client comes back while chunks are made."""

KEPT = {"protocol_extensions": ["session", "queue", "control_ack", "pause", "history"]}


@pytest.fixture(autouse=True)
def every_chunk_is_kept(monkeypatch):
    """This engine is many chunks ahead of what a client has read. A real one takes longer for each than its line."""
    monkeypatch.setattr("lingbot_rt.server.live_session.KEPT_CHUNKS", 1000)


def resume(token: str | bytes, **fields: Any) -> dict[str, Any]:
    return {"type": "init", "resume": token} | fields


class Player:
    """A client that counts what it has got, as one does that wants to come back."""

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self.chunk = -1  # the newest of which it has frames
        self.of_chunk = 0  # how many
        self.stats: list[int] = []

    @property
    def received(self) -> dict[str, int]:
        return {} if self.chunk < 0 else {"received_chunk": self.chunk, "received_frames": self.of_chunk}

    async def take(self, client: Client) -> dict[str, Any]:
        """One message."""
        message, payload = await client.receive()
        if message["type"] == "chunk_stats":
            self.stats.append(message["chunk_index"])
        elif payload is not None:
            if message["chunk_index"] != self.chunk:
                self.chunk, self.of_chunk = message["chunk_index"], 0
            self.of_chunk += message["num_frames"]
            self.frames += client._decode(message, payload)
        return message

    async def take_frames(self, client: Client, number: int) -> None:
        """Until it has ``number`` frames or a few more."""
        while len(self.frames) < number:
            await self.take(client)

    def check(self, server: Running, expected: int | None = None) -> None:
        """Every frame came once, in order, as if the line had never been lost."""
        plan = server.engine.opened[0]
        assert len(self.frames) == expected or expected is None
        for number, pixels in enumerate(self.frames):
            np.testing.assert_array_equal(pixels, frame(plan, number), str(number))


async def token_of(client: Client) -> str:
    message = await client.until("session")
    assert message["resume_s"] == 60
    return message["resume_token"]


@asynccontextmanager
async def lost(server: Running, *messages: dict[str, Any]):
    """A client whose line breaks at the end of the block."""
    async with server.client(*messages) as client:
        yield client
        client.socket.transport.abort()


@pytest.mark.parametrize("name", ["raw", "delta-gzip"])
async def test_a_lost_line_costs_nothing(serve, name):
    """Cut off again and again, at any frame, the client gets every frame of the world once and in order."""
    server, player = await serve(FakeEngine(group_s=SLOW)), Player()
    async with lost(server, init(realtime_output_format=name, **KEPT)) as client:
        token = await token_of(client)
        await player.take_frames(client, 4)
    for cut in (5, 24, 25, 49):
        async with lost(server, resume(token, **player.received)) as client:
            message = await client.until("session")
            assert (message["resumed"], message["exact"], message["resume_token"]) == (True, True, token)
            assert message["session_id"] == server.engine.opened[0].session_id
            client._last = None
            expected = len(player.frames) + 1
            await player.take_frames(client, max(cut, expected))
    async with server.client(resume(token, max_chunks=2, **player.received)) as client:
        with suppress(ConnectionClosed):
            while True:
                await player.take(client)
    player.check(server)
    assert len(player.frames) == frames_before(server.engine.opened[0], player.chunk + 1)
    assert player.stats == sorted(player.stats)
    assert len(server.engine.opened) == 1
    await server.idle()


async def test_nothing_is_generated_while_nobody_watches(serve):
    """The chunk in work is finished, the slot is given on at once, and the parked world waits unchanged."""
    server, player = await serve(FakeEngine(group_s=SLOW)), Player()
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        await player.take_frames(client, 10)
    async with server.client(init(max_chunks=3)) as other:
        assert [len((await other.chunk()).frames) for _ in range(3)] == [9, 12, 12]
    await wait_until(lambda: server.service.parking.count == 1)
    generated = [plan for plan in server.engine.plans if plan.session_id == server.engine.opened[0].session_id]
    assert len(generated) <= 3
    server.service.show_metrics()
    assert server.service.metrics.registry.get_sample_value("lingbot_rt_live_sessions", {"state": "parked"}) == 1
    assert server.service.metrics.registry.get_sample_value("lingbot_rt_parked_bytes") > 10**6
    assert server.engine.parked == [server.engine.opened[0].session_id]
    async with server.client(resume(token, **player.received, max_chunks=1)) as client:
        await client.until("session")
        await player.take_frames(client, 33)
        await client.closed()
    player.check(server)


async def test_what_the_server_sent_counts_without_a_word_of_the_client(serve):
    """An init that says nothing of what came goes on behind the frames that left."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        first = await client.chunk()
        await client.send(event("pause"))
        await client.until("chunk_stats")
    async with server.client(resume(token)) as client:
        message = await client.until("session")
        await client.send(event("resume"))
        chunk = await client.chunk()
    assert chunk.stats["chunk_index"] == message["chunk_index"] == 2
    assert len(first.frames) == 9


async def test_the_newer_of_two_clients_wins(serve):
    """Its old socket may look alive: it is told and closed, and the world goes on without a gap."""
    server, player = await serve(FakeEngine(group_s=SLOW)), Player()
    async with server.client(init(**KEPT)) as old:
        token = await token_of(old)
        await player.take_frames(old, 13)
        async with server.client(resume(token, **player.received)) as new:
            await new.until("session")
            code, reason = await old.closed()
            assert (code, reason, old.seen[-1]["code"]) == (1008, "resumed elsewhere", "resumed_elsewhere")
            await player.take_frames(new, 60)
    player.check(server)


async def test_a_client_in_line_with_a_token_gives_way_to_a_newer_one(serve):
    """Whoever waits holds the world; if it goes, the world waits on."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
    async with server.client(init()) as other:
        await other.receive()
        async with server.client(resume(token)) as first:
            await first.until("queue")
            async with lost(server, resume(token)) as second:
                await second.until("queue")
                assert (await first.closed())[0] == 1008
        await wait_until(lambda: server.service.parking.count == 1)
        async with server.client(resume(token)) as third:
            await third.until("queue")
            await other.socket.close()
            assert (await third.until("session"))["resumed"]


@pytest.mark.parametrize("code", [1000, None])
async def test_a_client_that_leaves_on_purpose_ends_its_world(serve, code):
    """Close 1000, or a close without a code, is no lost line."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(**KEPT)) as client:
        token = await token_of(client)
        if code is None:
            client.socket.transport.write(b"\x88\x80" + bytes(4))
            await client.closed()
    await server.idle()
    async with server.client(resume(token)) as client:
        error = await client.error()
        assert (error["code"], error["field"]) == ("invalid_init", "resume")
        await client.send(init(max_chunks=1))  # on the same socket
        assert len((await client.chunk()).frames) == 9


async def test_clients_without_the_extension_see_no_change(serve):
    """Drop-in clients get no token and are not parked; nor is anybody with --resume-s 0."""
    for options, message in (({}, init()), ({"resume_s": 0}, init(**KEPT))):
        server = await serve(FakeEngine(group_s=SLOW), **options)
        async with lost(server, message) as client:
            first, _ = await client.receive()
            assert "resume_token" not in first
            assert (first["type"] == "session") == bool(options)
        await server.idle()
        assert server.service.parking.count == 0


async def test_a_parked_world_ends_in_time(serve):
    """After --resume-s it is closed, and its token says so."""
    server = await serve(FakeEngine(group_s=SLOW), resume_s=0.05)
    async with lost(server, init(**KEPT)) as client:
        token = (await client.until("session"))["resume_token"]
    await wait_until(lambda: server.engine.closed)
    async with server.client(resume(token)) as client:
        assert "--resume-s 0.05" in (await client.error())["content"]
    ends = server.service.metrics.registry
    await wait_until(lambda: ends.get_sample_value("lingbot_rt_session_ends_total", {"reason": "not_resumed"}) == 1)


async def test_a_token_of_someone_else_opens_nothing(serve):
    """Guesses, other keys and other types are refused alike."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
    assert len(token) >= 43
    for guess in ("", token[:-1], token + "x", token.swapcase(), "x" * 10**5):
        async with server.client(resume(guess)) as client:
            assert (await client.error())["field"] == "resume"
    await wait_until(lambda: server.service.parking.count == 1)


async def test_an_engine_that_fails_while_nobody_watches_ends_the_world(serve):
    """The token then says that the session ended; the next session works."""
    engine, gate = FakeEngine(group_s=SLOW, fail_at_chunk=1), threading.Event()
    server = await serve(engine)
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        await client.receive()
        engine.occupy(gate)
        await wait_until(lambda: len(engine.plans) == 2)
    await wait_until(lambda: not server.service.connections)
    async with server.client(resume(token)) as client:
        gate.set()
        assert (await client.error())["field"] == "resume"
    engine.fail_at_chunk = None
    await server.idle()
    async with server.client(init(max_chunks=1)) as client:
        assert len((await client.chunk()).frames) == 9


async def test_beyond_parked_mb_the_oldest_become_snapshots_and_then_end(serve):
    """A world that is kept as a snapshot goes on too; one that does not fit ends, and says so."""
    engine = FakeEngine(group_s=SLOW, parked_bytes=2 * 2**20)
    server, tokens = await serve(engine, parked_mb=3), []
    for number in count():
        async with lost(server, init(**KEPT)) as client:
            tokens.append(await token_of(client))
        await wait_until(lambda number=number: server.service.parking.count == number + 1)
        if number == 1:
            break
    await wait_until(lambda: len(engine.closed) == 1)
    assert len(engine.snapshots) == 1
    async with server.client(resume(tokens[0], max_chunks=1)) as client:
        message = await client.until("session")
        assert (message["resumed"], message["exact"]) == (True, False)
        assert (await client.chunk()).stats["chunk_index"] == message["chunk_index"] == engine.snapshots[0]
        assert (await client.closed())[0] == 1000
    server.service.parking._max_bytes = 0
    async with lost(server, init(**KEPT)) as client:
        await token_of(client)
    await wait_until(lambda: not server.service.parking.count)
    await server.idle()


# --- going back ---


async def test_going_back(serve):
    """``rewound`` comes between the old frames and the new ones; the new ones are those of the chunk, each once."""
    server, player = await serve(FakeEngine(group_s=SLOW)), Player()
    async with server.client(init(realtime_output_format="delta-gzip", **KEPT)) as client:
        await player.take_frames(client, 40)
        await client.send(event("rewind", {"chunk": 1}, event_id=5))
        while (message := await player.take(client))["type"] != "rewound":
            pass
        assert (message["chunk_index"], message["branch"], message["event_id"]) == (1, 0, 5)
        player.check(server)
        again = Player()
        client._last = None
        await again.take_frames(client, 30)
        assert again.chunk >= 3
        for number, pixels in enumerate(again.frames):
            np.testing.assert_array_equal(pixels, frame(server.engine.opened[0], 9 + number))
        await client.send(event("branch", {"chunk": 2}))
        assert (await client.until("rewound"))["branch"] == 1
        stats = (await client.chunk()).stats
        assert (stats["chunk_index"], stats["branch"], stats["kept_from"]) == (2, 1, 0)
    await server.idle()


async def test_a_paused_world_goes_back_at_once(serve):
    """And stays paused; what the engine does not keep any more is refused, and the world stands where it stood."""
    server = await serve(FakeEngine(kept_chunks=2))
    async with server.client(init(**KEPT)) as client:
        for _ in range(5):
            await client.chunk()
        await client.send(event("pause"))
        while (await client.receive())[0].get("type") != "control_ack":
            pass
        await client.send(event("rewind", {"chunk": 0}, event_id=1))
        error = await client.until("error")
        assert error["code"] == "invalid_event"
        assert error["field"] == "chunk"
        newest = server.engine._next_chunk[server.engine.opened[0].session_id]
        await client.send(event("rewind", {"chunk": newest - 1}, event_id=2))
        assert (await client.until("rewound"))["chunk_index"] == newest - 1
        assert server.engine._next_chunk[server.engine.opened[0].session_id] == newest - 1
        await client.send(event("resume"))
        assert (await client.chunk()).stats["chunk_index"] == newest - 1


async def test_going_back_holds_when_the_line_is_lost_meanwhile(serve):
    """Engine and session stand at the same chunk, whenever the client vanishes."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        for _ in range(3):
            await client.chunk()
        await client.send(event("rewind", {"chunk": 1}))
    async with server.client(resume(token, max_chunks=2)) as client:
        await client.until("session")
        await client.closed()  # the engine raises for a chunk out of its order
    assert client.socket.close_code == 1000


# --- saved worlds ---


async def saved_world(server: Running, client: Client) -> bytes:
    await client.send(event("save", event_id=9))
    message, payload = {}, None
    while message.get("type") != "world":
        message, payload = await client.receive()
    assert payload is not None
    return payload


async def test_a_saved_world_goes_on_as_another_session(serve):
    """Also on another server: the same controls and prompt, from the chunk at which it was saved."""
    first, second = await serve(FakeEngine(group_s=SLOW)), await serve(FakeEngine())
    async with first.client(init(seed=7, **KEPT)) as client:
        await client.send(event("camera_actions", state("w"), event_id=1))
        await client.send(event("prompt", "Snow falls.", event_id=2))
        while (await client.chunk()).stats["event_id"] != 2:
            pass
        world = await saved_world(first, client)
    async with second.client(resume(world, protocol_extensions=["session"], max_chunks=2)) as client:
        message = await client.until("session")
        assert message["session_id"] != first.engine.opened[0].session_id
        assert message["resume_token"]
        chunk = await client.chunk()
        assert chunk.stats["chunk_index"] == message["chunk_index"] == first.engine.snapshots[-1]
        await client.chunk()
        assert (await client.closed())[0] == 1000
    plan, opened = second.engine.plans[0], second.engine.opened[0]
    assert (plan.prompt, plan.event_id, opened.seed) == ("Snow falls.", 2, 7)
    np.testing.assert_array_equal(opened.first_frame, first.engine.opened[0].first_frame)
    np.testing.assert_array_equal(plan.relative_poses, first.engine.plans[plan.chunk_index].relative_poses)
    expected = frame(first.engine.opened[0], frames_before(opened, plan.chunk_index))
    np.testing.assert_array_equal(chunk.frames[0], expected)


async def test_files_that_are_no_world_of_this_model_are_refused(serve):
    """In one line that names the field, on a socket that stays open; nothing is opened."""
    server = await serve(FakeEngine(group_s=SLOW), max_pixels=64 * 64)
    async with server.client(init(**KEPT)) as client:
        await client.chunk()
        world = await saved_world(server, client)
    wrong = {
        "nothing": b"",
        "half": world[: len(world) // 2],
        "another file": save({"x": np.zeros(3)}),
        "another model": world.replace(b"fake-world", b"more-world"),
        "controls": re.sub(rb'(next_index\\": )(\d)', lambda found: found[1] + b"%d" % (int(found[2]) + 1), world),
        "too large here": world.replace(b"64x64", b"96x96"),
    }
    async with server.client() as client:
        for what, data in wrong.items():
            await client.send(resume(data))
            error = await client.error()
            assert (error["code"], error["field"]) == ("invalid_init", "resume"), what
            assert "\n" not in error["content"]
        await client.send(resume(world, max_chunks=1))
        assert len((await client.chunk()).frames) == 12


# --- on disk ---


async def test_a_server_that_stops_keeps_its_worlds(tmp_path, monkeypatch):
    """Those that play and those that are parked: the next one goes on with both, once each, from files that only their
    owner reads."""
    monkeypatch.setattr(connection, "FINISH_S", 30.0)  # a busy machine sends the chunk in work too
    monkeypatch.setattr(app, "SHUTDOWN_LIMIT_S", 60.0)
    tokens, players = [], [Player(), Player()]
    async with running(FakeEngine(group_s=SLOW), park_dir=str(tmp_path)) as server:
        async with lost(server, init(**KEPT)) as client:
            tokens.append(await token_of(client))
            await players[0].take_frames(client, 9)
        async with server.client(init(**KEPT)) as client:
            tokens.append(await token_of(client))
            await players[1].take_frames(client, 20)
            server.server.should_exit = True
            with suppress(ConnectionClosed):
                while True:
                    await players[1].take(client)
            assert client.socket.close_code == 1001
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert not any(token in file.name for token in tokens for file in files)
    async with running(FakeEngine(), park_dir=str(tmp_path)) as server:
        for token, player in zip(tokens, players, strict=True):
            async with server.client(resume(token, max_chunks=1, **player.received)) as client:
                message = await client.until("session")
                assert (message["resumed"], message["resume_token"]) == (True, token)
                chunk = await client.chunk()
                assert chunk.stats["chunk_index"] == message["chunk_index"]
                plan = server.engine.opened[-1]
                number = frames_before(plan, message["chunk_index"])
                np.testing.assert_array_equal(chunk.frames[0], frame(plan, number))
                assert (await client.closed())[0] == 1000
            if player is players[1]:
                assert number == len(player.frames)  # what was in work was sent before the close
        await wait_until(lambda: not list(tmp_path.iterdir()))


async def test_a_server_that_is_killed_loses_few_chunks(tmp_path):
    """With --snapshot-every the newest file is at most so many chunks old; an end on purpose leaves none."""
    engine = FakeEngine(group_s=0.05)  # no snapshot begins while one is written: a busy disk has 0.45 s for each
    async with running(engine, park_dir=str(tmp_path), snapshot_every=3) as server:
        async with server.client(init(**KEPT)) as client:
            token = await token_of(client)
            while (await client.chunk()).stats["chunk_index"] < 7:
                pass
            assert engine.snapshots[:2] == [3, 6]
            await wait_until(lambda: list(tmp_path.glob("*.world")))
            (file,) = tmp_path.glob("*.world")
            copy = file.read_bytes()
        await wait_until(lambda: not list(tmp_path.iterdir()))
    file.write_bytes(copy)
    (tmp_path / "0.world.part").write_bytes(b"cut off")
    async with running(FakeEngine(), park_dir=str(tmp_path), api_key="other", snapshot_every=3) as server:
        key = {"additional_headers": {"Authorization": "Bearer other"}}
        async with server.client(resume(token), **key) as client:
            assert (await client.error())["field"] == "resume"  # a token works only with its key
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    async with (
        running(FakeEngine(), park_dir=str(tmp_path), snapshot_every=3) as server,
        server.client(resume(token, max_chunks=1)) as client,
    ):
        assert (await client.chunk()).stats["chunk_index"] >= 3


async def test_a_disk_that_is_full_ends_the_world_and_not_the_server(tmp_path, caplog):
    """The stop says so in one line; a snapshot that fails in play is logged, and the world goes on."""
    engine = FakeEngine(group_s=0.002, snapshot_error=EngineFailed("no room"))
    folder = tmp_path / "worlds"
    async with (
        running(engine, park_dir=str(folder), snapshot_every=2) as server,
        server.client(init(**KEPT)) as client,
    ):
        while (await client.chunk()).stats["chunk_index"] < 5:
            pass
        engine.snapshot_error = None  # from here on it is the folder that is missing
        while (await client.chunk()).stats["chunk_index"] < 12:
            pass
        server.server.should_exit = True
        await client.closed()
    texts = [record.getMessage() for record in caplog.records]
    assert any("cannot be written: no room" in text for text in texts)
    assert any(f"--park-dir {folder}: No such file or directory" in text for text in texts)
    assert not [record for record in caplog.records if record.exc_info]


async def test_what_nobody_comes_for_is_deleted(tmp_path):
    """Files of an earlier server stay for --resume-s after this one is ready."""
    (tmp_path / ("a" * 64 + ".world")).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    async with running(FakeEngine(), park_dir=str(tmp_path), resume_s=0.05):
        await wait_until(lambda: [path.name for path in tmp_path.iterdir()] == ["notes.txt"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"park_dir": "/tmp", "resume_s": 0}, "--park-dir needs --resume-s above 0"),
        ({"snapshot_every": 3}, "--snapshot-every 3 needs --park-dir"),
    ],
)
def test_options_that_need_each_other(options, text):
    """The start says which flag is missing."""
    with pytest.raises(ConfigError, match=text):
        ServeConfig(**options)


async def test_a_record_goes_on_and_ends_where_the_session_goes_back(serve, tmp_path, caplog):
    """A lost line leaves no gap in it. Going back would make chunks of one number twice, so it ends there."""
    caplog.set_level("INFO")
    server, player = await serve(FakeEngine(group_s=SLOW), record_dir=str(tmp_path)), Player()
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        await player.take_frames(client, 12)
    async with server.client(resume(token, **player.received)) as client:
        await client.until("session")
        await player.take_frames(client, 40)
        await client.send(event("rewind", {"chunk": 1}))
        await client.until("rewound")
        await client.chunk()
    await server.idle()
    (folder,) = tmp_path.iterdir()
    record = read_record(folder)
    assert [chunk.index for chunk in record.chunks] == list(range(len(record.chunks)))
    assert len(record.chunks) >= 2
    assert [len(chunk.hashes) for chunk in record.chunks] == [9] + [12] * (len(record.chunks) - 1)
    assert record.end.reason == "the session went back to an earlier chunk"
    texts = [entry.getMessage() for entry in caplog.records]
    assert any(text.endswith("for 60 s") and "is parked" in text for text in texts)
    assert any(text.endswith("goes on, from memory") for text in texts)
    assert sum("ended: client_gone" in text for text in texts) == 1


async def test_the_server_says_what_it_keeps(serve):
    """From /v1/models a page knows whether there is anything to come back to."""
    for options, expected in (
        ({}, {"resume_s": 60, "history_mb": 512, "exact": False, "outlive_the_server": False}),
        ({"resume_s": 0, "history_mb": 0}, {"resume_s": 0, "history_mb": 0, "exact": False}),
    ):
        server = await serve(**options)
        async with httpx.AsyncClient() as client:
            entry = (await client.get(f"{server.http}/v1/models")).json()["data"][0]
        assert entry["kept_worlds"] == expected | {"outlive_the_server": False}
        assert (entry["features"]["resume"], entry["features"]["history"]) == (not options, not options)
        assert "history" in entry["extensions"]


async def test_many_cycles_leave_nothing(serve):
    """Parking and resuming again and again: one session, one slot, no task and no frame left over."""
    server, player = await serve(FakeEngine()), Player()
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        await player.take(client)
    tasks = len(asyncio.all_tasks())
    for number in range(30):
        async with lost(server, resume(token, **player.received)) as client:
            await client.until("session")
            await player.take_frames(client, len(player.frames) + 1 + number % 5)
    async with asyncio.timeout(LIMIT_S):
        await wait_until(lambda: server.service.parking.count == 1)
    player.check(server)
    assert len(server.service.parking._kept) == 1
    assert len(asyncio.all_tasks()) <= tasks + 5
    await server.service.parking.end(next(iter(server.service.parking._kept.values())), "test")
    await server.idle()
