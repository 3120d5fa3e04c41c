"""What the protocol's extensions add to a connection."""

from __future__ import annotations

import asyncio

from lingbot_rt.session.plan import WarmUp
from lingbot_rt.session.session import Session
from lingbot_rt.shapes import FrameSize
from tests.server.conftest import LIMIT_S, event, init, state, wait_until
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds per latent frame: slow enough to meet a chunk in the middle."""


async def test_extensions_are_spoken_only_when_asked_for(serve):
    """Without them only the reference's four types are sent; with them come the introduction and the acks."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(), event("camera_actions", state("w"), 1)) as client:
        await client.chunk()
        await client.chunk()
    assert client.seen == []
    asked = init(protocol_extensions=["session", "control_ack", "unheard-of"])
    server.engine.may_open.clear()
    async with server.client(asked, event("camera_actions", state("w"), 7)) as client:
        client.seen.append(await client.until("control_ack"))
        server.engine.may_open.set()
        chunk = await client.chunk()
    kinds = [message["type"] for message in client.seen]
    assert kinds.count("session") == 1
    told = next(message for message in client.seen if message["type"] == "session")
    assert told["session_id"] == chunk.stats["session_id"]
    assert told["capabilities"]["extensions"] == ["session", "control_ack"]
    acks = [message for message in client.seen if message["type"] == "control_ack"]
    assert [(ack["state"], ack["event_id"], ack.get("chunk_index")) for ack in acks] == [
        ("received", 7, None),
        ("applied", 7, 0),
    ]


async def test_pause_holds_the_world_and_resume_goes_on(serve):
    """After a pause the chunk in work is finished and no other begins; resume continues with the next index."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(protocol_extensions=["pause", "control_ack"])) as client:
        await client.receive()
        await client.send(event("pause", event_id=1))
        await client.until("control_ack")
        planned = len(server.engine.plans)
        while (await client.chunk()).stats["chunk_index"] < planned - 1:
            pass
        await asyncio.sleep(2 * SLOW)
        assert len(server.engine.plans) == planned
        await client.send(event("resume", event_id=2))
        assert (await client.chunk()).stats["chunk_index"] == planned


async def test_a_pause_that_lasts_too_long_ends_the_session(serve, monkeypatch):
    """The error names the flag, the close is 1008, and whoever waits gets the slot."""
    tick, passed_s = Session.tick, 0
    monkeypatch.setattr(Session, "tick", lambda session, now: tick(session, now + passed_s))
    monkeypatch.setattr("lingbot_rt.server.connection.TICK_S", 0.01)
    server = await serve(FakeEngine(group_s=SLOW), pause_limit_s=300, session_wait_s=LIMIT_S)
    async with (
        server.client(init(protocol_extensions=["pause", "control_ack"]), event("pause")) as client,
        server.client() as waiting,
    ):
        await client.until("control_ack")
        await waiting.send(init(max_chunks=1))
        await wait_until(lambda: server.service.admission.waiting)
        passed_s = 301
        error = await client.until("error")
        assert (error["code"], "--pause-limit-s" in error["content"]) == ("pause_expired", True)
        assert (await client.closed())[0] == 1008
        assert len((await waiting.chunk()).frames) == 9


async def test_every_event_of_a_chunk_comes_back_as_applied(serve):
    """Twenty events while one chunk runs: twenty "received", then twenty "applied" by the next chunk, in order."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(protocol_extensions=["control_ack"])) as client:
        await client.receive()
        for number in range(20):
            await client.send(event("camera_actions", state("w" if number % 2 else "d"), number))
        while len(client.seen) < 40:
            await client.chunk()
    for acknowledged in ("received", "applied"):
        assert [ack["event_id"] for ack in client.seen if ack["state"] == acknowledged] == list(range(20))


async def test_a_heartbeat_comes_while_nothing_else_does(serve, monkeypatch):
    """A paused session with the extension ``heartbeat`` still shows that it lives."""
    monkeypatch.setattr("lingbot_rt.session.session.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("lingbot_rt.server.connection.TICK_S", 0.01)
    server = await serve(FakeEngine())
    async with server.client(init(protocol_extensions=["heartbeat", "pause"]), event("pause")) as client:
        beat = await client.until("heartbeat")
    assert beat["state"] == "paused"


async def test_a_session_that_compiles_first_says_so(serve, monkeypatch):
    """Whoever asked hears of it with size and usual time, and heartbeats come meanwhile; events count from the first
    chunk. Others hear nothing that they do not know, and later sessions nothing at all."""
    monkeypatch.setattr("lingbot_rt.session.session.HEARTBEAT_S", 0.02)
    monkeypatch.setattr("lingbot_rt.server.connection.TICK_S", 0.01)
    engine = FakeEngine(warm_up=WarmUp(FrameSize(64, 64), 3, 12.5))
    engine.may_open.clear()
    server = await serve(engine)
    asked = init(max_chunks=1, protocol_extensions=["session", "heartbeat", "warming", "control_ack"])
    async with server.client(asked) as client:
        told, _ = await client.receive()
        assert told == {
            "type": "warming",
            "session_id": told["session_id"],
            "size": "64x64",
            "expected_ms": 12500,
        }
        assert (await client.receive())[0]["state"] == "warming"
        await client.send(event("camera_actions", state("w"), 7))
        assert (await client.until("control_ack"))["state"] == "received"
        engine.may_open.set()
        assert (await client.until("session"))["session_id"] == told["session_id"]
        assert (await client.chunk()).stats["event_id"] == 7
    engine.opened.clear()
    engine.may_open.clear()
    async with server.client(init(max_chunks=1, protocol_extensions=["heartbeat"])) as client:
        assert (await client.receive())[0]["state"] == "running"
        engine.may_open.set()
        await client.chunk()
        assert {message["type"] for message in client.seen} <= {"heartbeat"}
    async with server.client(asked) as client:
        assert (await client.receive())[0]["type"] == "session"
        await client.chunk()


async def test_a_refused_warm_up_leaves_the_socket_open(serve):
    """The client may send an init of another size on it."""
    engine = FakeEngine(warm_up=WarmUp(FrameSize(128, 64), 3, None), max_open_pixels=64 * 64)
    server = await serve(engine)
    async with server.client(init(size="128x64", protocol_extensions=["warming", "session"])) as client:
        told, _ = await client.receive()
        assert (told["type"], "expected_ms" in told) == ("warming", False)
        assert (await client.error())["code"] == "capacity"
        engine.opened.append(None)
        await client.send(init(max_chunks=1))
        assert len((await client.chunk()).frames) == 9
