"""How a connection ends: completion, failure, a client that leaves or stalls, a second client, shutdown."""

from __future__ import annotations

import asyncio
import socket as sockets
import threading

import msgspec
from websockets.asyncio.client import connect

from lingbot_rt.config import ENDPOINT
from tests.server.conftest import LIMIT_S, Client, event, init, running, wait_until
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds per latent frame: slow enough to meet a chunk in the middle."""


async def test_max_chunks_ends_the_session(serve):
    """Everything is delivered, then close 1000 says that the generation is complete."""
    server = await serve()
    async with server.client(init(max_chunks=3)) as client:
        assert [len((await client.chunk()).frames) for _ in range(3)] == [9, 12, 12]
        assert await client.closed() == (1000, "generation complete")
    await server.idle()


async def test_an_engine_failure_is_told_then_closed_with_1011(serve):
    """The chunk before arrives whole; the error names what broke; the next session works."""
    server = await serve(FakeEngine(fail_at_chunk=1))
    async with server.client(init()) as client:
        assert len((await client.chunk()).frames) == 9
        error = await client.error()
        assert error["content"] == "error during generate loop: RuntimeError: out of fuel"
        assert (await client.closed())[0] == 1011
    server.engine.fail_at_chunk = None
    async with server.client(init(max_chunks=2)) as client:
        await client.chunk()
        await client.chunk()
        assert (await client.closed())[0] == 1000


async def test_a_client_that_leaves_frees_everything(serve):
    """Gone before the init, while opening, in mid-chunk or while paused: slot and engine are free each time."""
    server = await serve(FakeEngine(group_s=SLOW))
    engine = server.engine
    pausing = init(protocol_extensions=["pause", "control_ack"])
    moments = {
        "before the init": [],
        "while opening": [init()],
        "in mid-chunk": [init()],
        "while paused": [pausing],
    }
    for moment, messages in moments.items():
        for abrupt in (False, True):
            engine.opening.clear()
            if moment == "while opening":
                engine.may_open.clear()
            async with server.client(*messages) as client:
                if moment == "while opening":
                    await wait_until(lambda: engine.opening)
                if moment in ("in mid-chunk", "while paused"):
                    await client.receive()
                if moment == "while paused":
                    await client.send(event("pause"))
                    await client.until("control_ack")
                if abrupt:
                    client.socket.transport.abort()
            engine.may_open.set()
            await server.idle()
    assert len(engine.closed) == len(engine.opened) == 6


async def test_a_client_that_leaves_at_the_very_end_frees_everything(serve):
    """Gone after the last chunk, while the engine's thread has not yet come to closing the session: it still closes."""
    server, gate = await serve(FakeEngine(group_s=SLOW)), threading.Event()
    async with server.client(init(max_chunks=1)) as client:
        await client.receive()
        server.engine.occupy(gate)
        await client.chunk()
    await asyncio.sleep(0.1)
    gate.set()
    await wait_until(lambda: not server.service.connections)
    await asyncio.get_running_loop().run_in_executor(server.engine._thread, int)
    assert server.engine.live == 0


async def test_a_reload_is_never_refused_by_its_own_old_socket(serve):
    """However long the old chunk takes to stop, the new socket waits for it instead of being refused."""
    server = await serve(FakeEngine(group_s=SLOW, close_s=0.06), session_wait_s=0.02)
    for _ in range(2):
        async with server.client(init()) as old:
            await old.receive()
            old.socket.transport.abort()
            async with server.client(init(max_chunks=1)) as new:
                assert len((await new.chunk()).frames) == 9
                assert (await new.closed())[0] == 1000


async def test_a_second_client_is_refused_in_words(serve):
    """After the wait: the reference's error, then close 1008; the first session is not disturbed."""
    server = await serve(FakeEngine(group_s=SLOW), session_wait_s=0.05)
    async with server.client(init()) as first:
        await first.receive()
        async with server.client(init()) as second:
            error = await second.error()
            assert error["content"] == "another realtime session is already active"
            assert error["code"] == "session_busy"
            assert (await second.closed())[0] == 1008
        await first.chunk()
        assert (await first.chunk()).stats["num_frames"] == 12


IN_LINE = {"protocol_extensions": ["queue"]}


async def test_the_line_is_served_in_order(serve):
    """Clients with the extension ``queue`` wait without a limit, see their place, and enter by themselves."""
    server = await serve(FakeEngine(group_s=SLOW), session_wait_s=0)
    async with server.client(init()) as first:
        await first.receive()
        async with (
            server.client(init(max_chunks=1, **IN_LINE)) as second,
            server.client() as left,
            server.client() as third,
        ):
            place = await second.until("queue")
            assert (set(place), place["position"]) == ({"type", "position", "waited_ms"}, 1)
            for position, client in ((2, left), (3, third)):
                await client.send(init(max_chunks=1, **IN_LINE))
                assert (await client.until("queue"))["position"] == position
            await left.socket.close()
            while (await third.until("queue"))["position"] != 2:
                pass
            await first.socket.close()
            assert len((await second.chunk()).frames) == 9
            assert len((await third.chunk()).frames) == 9
            assert [place["position"] for place in third.seen][-2:] == [1, 0]


async def test_a_full_line_refuses_in_words(serve):
    """The error begins like that of every busy server and names the flag."""
    server = await serve(FakeEngine(group_s=SLOW), session_wait_s=0, max_waiting=0)
    async with server.client(init()) as first:
        await first.receive()
        async with server.client(init(**IN_LINE)) as second:
            error = await second.error()
            assert error["content"].startswith("another realtime session is already active")
            assert ("--max-waiting" in error["content"], error["code"]) == (True, "session_busy")
            assert (await second.closed())[0] == 1008


async def test_the_line_ends_when_the_server_stops():
    """Who waits in line gets the error and the close of the shutdown, and is not served meanwhile."""
    async with running(engine := FakeEngine(group_s=SLOW)) as server, server.client(init()) as first:
        await first.receive()
        async with server.client(init(**IN_LINE)) as second:
            await second.until("queue")
            await server.service.close_all(LIMIT_S)
            assert (await second.error())["code"] == "shutting_down"
            assert (await second.closed())[0] == 1001
        assert len(engine.opened) == 1


async def test_a_wait_in_line_does_not_use_up_the_time_for_an_init(monkeypatch, serve):
    """A session that is refused when its turn comes may be replaced on the same socket, however long the line was."""
    loop, jump_s = asyncio.get_running_loop(), 0
    now = loop.time  # the server ends before the clock is set back, or its timers would be late by the jump
    monkeypatch.setattr(loop, "time", lambda: now() + jump_s)
    server = await serve(FakeEngine(group_s=SLOW, max_open_pixels=256 * 256), init_timeout_s=60)
    async with server.client(init()) as first:
        await first.receive()
        async with server.client(init(size="640x384", **IN_LINE)) as second:
            await second.until("queue")
            jump_s = 61
            await first.socket.close()
            assert (await second.until("error"))["code"] == "capacity"
            await second.send(init(max_chunks=1))
            assert len((await second.chunk()).frames) == 9


async def test_a_client_that_stops_reading_costs_only_itself(serve):
    """It loses its session after the limit; the next client is served; what was buffered stayed bounded."""
    server = await serve(FakeEngine(), send_timeout_s=0.5, session_wait_s=LIMIT_S)
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 8192)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, ("127.0.0.1", server.port))
    with raw:
        async with connect(server.ws, sock=raw, compression=None, max_queue=1, max_size=None, ping_interval=None) as it:
            await Client(it).send(init(size="640x384"))
            await wait_until(lambda: server.engine.opened and not server.engine.live)
            assert len(server.engine.plans) <= 2  # the chunk that leaves and the one behind it
            async with server.client(init(max_chunks=1)) as other:
                assert len((await other.chunk()).frames) == 9
            it.transport.abort()
    await server.idle()


async def test_a_client_that_answers_no_ping_loses_its_session(serve, caplog):
    """A peer that vanished without a word is noticed by the keepalive, and leaves neither a session nor a traceback."""
    server = await serve(FakeEngine(group_s=SLOW))
    server.server.config.ws_ping_interval = server.server.config.ws_ping_timeout = 0.5
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    handshake = f"GET {ENDPOINT} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n"
    writer.write(handshake.encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    writer.write(masked(msgspec.msgpack.encode(init())))
    await wait_until(lambda: server.engine.opened)
    async with asyncio.timeout(LIMIT_S):
        while await reader.read(65536):
            pass
    writer.close()
    await server.idle()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def masked(payload: bytes) -> bytes:
    """A binary WebSocket frame as clients send it, with a mask of zeros."""
    return b"\x82\xfe" + len(payload).to_bytes(2, "big") + bytes(4) + payload


async def test_shutdown_tells_the_session_first():
    """A running session gets an error, then close 1001; the engine is closed; the server ends."""
    engine = FakeEngine(group_s=SLOW)
    async with running(engine) as server, server.client(init()) as client:
        await client.receive()
        server.server.should_exit = True
        assert (await client.closed())[0] == 1001
        assert client.seen[-1]["code"] == "shutting_down"
    assert engine.live == 0
    assert engine.closed
