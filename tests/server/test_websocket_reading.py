"""What clients send reaches the session in small turns: nothing that one client does holds up the others."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from types import SimpleNamespace

import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from lingbot_rt.server import connection, service, serving
from lingbot_rt.server.connection import Connection
from lingbot_rt.server.frame_pieces import FramePieces
from lingbot_rt.server.websocket import READ_BYTES, READ_PAYLOAD_BYTES, UNSENT_BYTES, WebSocketProtocol
from lingbot_rt.session.messages import MAX_EVENT_BYTES
from tests.server.conftest import event, init, state, wait_until
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds per latent frame: slow enough to meet a chunk in the middle."""

MASK = bytes(4)


def masked(opcode: int, payload: bytes = b"") -> bytes:
    """A small WebSocket frame as clients send it, with a mask of zeros; 0x80 in ``opcode`` is the last of a message."""
    return bytes([opcode, 0x80 | len(payload)]) + MASK + payload


@pytest.mark.parametrize("in_session", [False, True])
async def test_text_that_is_not_utf8_is_told_and_closed(serve, caplog, in_session):
    """An error in words, close 1007 as the standard has it, nothing in the log, and the next client is served."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(*([init()] if in_session else [])) as client:
        if in_session:
            await client.receive()
        client.socket.transport.write(masked(0x81, b"caf\xe9"))
        error = await client.until("error")
        assert error["code"] == ("invalid_event" if in_session else "invalid_init")
        assert "not UTF-8" in error["content"]
        assert (await client.closed())[0] == 1007
    await server.idle()
    async with server.client(init(max_chunks=1)) as client:
        assert len((await client.chunk()).frames) == 9
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


async def test_health_is_answered_while_a_large_message_is_read(serve, monkeypatch):
    """However long it takes: large messages are read, and large inits checked, in a thread; small ones are not."""
    gate, reading, threads = threading.Event(), threading.Event(), {}

    def noted(name, work):
        def call(*args):
            threads.setdefault(name, []).append(threading.current_thread())
            if name == "decode" and len(args[0]) > service.INLINE_BYTES:
                reading.set()
                assert gate.wait(30)
            return work(*args)

        return call

    for module, name in ((connection, "decode"), (serving, "resolve")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(max_chunks=3, unread=bytes(10**6))) as client, httpx.AsyncClient() as http:
        await wait_until(reading.is_set)
        assert (await http.get(f"{server.http}/health")).status_code == 200
        gate.set()
        await client.receive()
        await client.send(event("camera_actions", state("w"), 1))
        assert [chunk.stats["chunk_index"] for chunk in [await client.chunk() for _ in range(3)]] == [0, 1, 2]
    main = threading.main_thread()
    assert [thread is main for thread in threads["decode"]] == [False, True]
    assert [thread is main for thread in threads["resolve"]] == [False]


async def test_a_burst_of_messages_is_taken_one_per_turn(serve, monkeypatch):
    """Thousands of small messages in one packet: other tasks run between any two of them."""
    turns, taken_at = 0, []
    take = Connection._take

    async def noted(self, message):
        taken_at.append(turns)
        return await take(self, message)

    monkeypatch.setattr(Connection, "_take", noted)
    server = await serve()

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with server.client() as client:
        turning = asyncio.create_task(turn())
        client.socket.transport.write(masked(0x82, b"\x80") * 2000)
        for _ in range(2000):
            assert (await client.error())["field"] == "type"
        turning.cancel()
    assert len(taken_at) == 2000
    assert len(set(taken_at)) == 2000


async def test_few_frames_are_cut_out_at_a_time(serve, monkeypatch):
    """Tens of thousands of empty frames from one socket are read in pieces."""
    pieces = []
    cut = FramePieces.cut
    monkeypatch.setattr(FramePieces, "cut", lambda self, data: pieces.append(data) or cut(self, data))
    server = await serve()
    async with server.client() as client:
        client.socket.transport.write(masked(0x8A) * 50_000 + masked(0x82, b"\x80"))  # pongs that nobody asked for
        await client.error()
        assert sum(map(len, pieces)) > 300_000
        assert max(map(len, pieces)) <= READ_BYTES
        pieces.clear()
        await client.send({"type": "init", "unread": bytes(10**6)})
        await client.error()
    assert max(map(len, pieces)) <= READ_PAYLOAD_BYTES + 100
    assert len(pieces) < 10**6 / READ_BYTES


async def test_a_message_of_many_fragments_is_joined_as_it_comes(serve, monkeypatch):
    """It is served, and no list of its fragments grows."""
    counts = []
    joined = WebSocketProtocol.handle_cont
    monkeypatch.setattr(
        WebSocketProtocol, "handle_cont", lambda self, frame: (joined(self, frame), counts.append(len(self.frames)))
    )
    server = await serve()
    message = msgspec.msgpack.encode(init(max_chunks=1))
    async with server.client() as client:
        frames = [masked(0, message[i : i + 1]) + masked(0) for i in range(1, len(message))]
        client.socket.transport.write(masked(0x02, message[:1]) + b"".join(frames) + masked(0x80))
        assert len((await client.chunk()).frames) == 9
    assert len(counts) > len(message)
    assert max(counts) == 1


def test_answers_to_pings_do_not_gather():
    """A client that sends pings and reads nothing gets no more answers than fit the buffer."""
    written: list[bytes] = []
    protocol = WebSocketProtocol.__new__(WebSocketProtocol)
    protocol.conn = SimpleNamespace(data_to_send=lambda: [bytes(100)])
    protocol.transport = SimpleNamespace(get_write_buffer_size=lambda: 100 * len(written), write=written.append)
    for _ in range(10_000):
        protocol.handle_ping()
    assert 10 <= len(written) <= 4 * UNSENT_BYTES // 100 + 1


async def test_a_large_event_is_refused_and_the_session_goes_on(serve):
    """The error has the size and the limit."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init()) as client:
        await client.receive()
        await client.send(event("prompt", "x" * MAX_EVENT_BYTES))
        error = await client.until("error")
        assert error["code"] == "invalid_event"
        assert f"at most {MAX_EVENT_BYTES}" in error["content"]
        await client.send({"type": "event", "kind": [[[[]]]] * 5, "payload": None})
        assert (await client.until("error"))["field"] == "kind"
        nested: list = []
        for _ in range(400):
            nested = [nested]
        await client.send({"type": "event", "kind": nested})
        assert "nested more than" in (await client.until("error"))["content"]
        await client.chunk()


async def test_a_client_that_leaves_while_its_message_is_read_leaves_nothing(serve, monkeypatch):
    """The thread goes on, the connection does not."""
    gate, reading = threading.Event(), threading.Event()

    def slowly(*args):
        reading.set()
        assert gate.wait(30)
        raise AssertionError("nobody waits for it")

    monkeypatch.setattr(connection, "decode", slowly)
    server = await serve()
    with suppress(ConnectionClosed):
        async with server.client(init(unread=bytes(10**4))) as client:
            await wait_until(reading.is_set)
            client.socket.transport.abort()
    gate.set()
    await server.idle()


async def test_a_stop_meets_a_client_that_has_closed_already(serve):
    """Whose close was answered, and whose socket is not gone yet: the stop goes on with the others."""
    server = await serve()
    async with server.client(init()) as client:
        await client.chunk()
        (protocol,) = server.server.server_state.connections
        protocol.conn.send_close(1000)  # the answer, not written yet
        protocol.shutdown()
        assert protocol.transport.is_closing()
    await server.idle()
