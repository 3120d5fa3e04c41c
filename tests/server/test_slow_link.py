"""A slow but living link: the session goes on, latency is told as it is, and little is on its way at any time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from websockets.asyncio.client import connect

from lingbot_rt.config import ENDPOINT
from lingbot_rt.server.websocket import UNSENT_BYTES
from lingbot_rt.session.session import Session
from tests.server.conftest import Client, event, init, state
from tests.server.fake_engine import FakeEngine

RECEIVE_BUFFER = 16384
FRAME = 64 * 64 * 3


class SlowLink:
    """A relay in front of the server that carries ``rate`` bytes per second and holds back what is beyond."""

    def __init__(self, port: int, rate: float) -> None:
        self._port = port
        self._rate = rate
        self.carried = 0

    async def __aenter__(self) -> SlowLink:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0, limit=RECEIVE_BUFFER)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}{ENDPOINT}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self._port))
        upstream, to_server = await asyncio.open_connection(sock=raw, limit=RECEIVE_BUFFER)

        async def up() -> None:
            while data := await reader.read(RECEIVE_BUFFER):
                to_server.write(data)
            to_server.close()

        sending = asyncio.create_task(up())
        while data := await upstream.read(2048):
            writer.write(data)
            self.carried += len(data)
            await asyncio.sleep(len(data) / self._rate)
        writer.close()
        await sending


@asynccontextmanager
async def slow_client(port: int, rate: float) -> AsyncIterator[tuple[Client, SlowLink]]:
    async with (
        SlowLink(port, rate) as link,
        connect(link.url, compression=None, max_size=None, ping_interval=None) as it,
    ):
        yield Client(it), link


async def test_a_slow_link_is_served_for_as_long_as_it_reads(serve):
    """Batches that take longer than --send-timeout-s and the keepalive's limit to cross the link arrive whole."""
    server = await serve(FakeEngine(), send_timeout_s=0.6)
    server.server.config.ws_ping_interval = server.server.config.ws_ping_timeout = 0.5
    # Raw frames of 128x128: 196 KB per batch, 0.8 seconds of this link.
    async with slow_client(server.port, rate=250_000) as (client, _):
        await client.send(init(size="128x128", max_chunks=1))
        chunk = await client.chunk()
        assert len(chunk.frames) == 9
        assert (await client.closed())[0] == 1000
    assert chunk.stats["raw_write_ms"] > 1000


async def test_what_counts_as_sent_is_nearly_at_the_client(serve, monkeypatch):
    """Few bytes stand between the server and a slow link, so that the latency it tells is true and a key is not behind
    megabytes of older frames."""
    in_between, link, counted = [], None, Session.sent

    def sent(session, chunk, times, pace_wait_ms):
        total = 12 * chunk.plan.chunk_index * FRAME + chunk.stats.raw_bytes
        in_between.append(total - link.carried)
        counted(session, chunk, times, pace_wait_ms)

    monkeypatch.setattr(Session, "sent", sent)
    server = await serve(FakeEngine(), send_timeout_s=5)
    async with slow_client(server.port, rate=500_000) as (client, slow_link):
        link = slow_link
        await client.send(init(size="64x64", realtime_output_format="raw"))
        await client.chunk()
        await client.send(event("camera_actions", state("w"), 7))
        received = 0
        while True:
            header, payload = await client.receive()
            if header["type"].startswith("frame_batch") and header.get("event_id") == 7:
                break
            received += len(payload or b"")
    # The chunk that leaves and the one that was prefetched go out first; an event may just miss the next one.
    assert received <= 3 * 12 * FRAME
    # The transport's buffer, the kernel's, and what the relay holds. Unbounded, megabytes stand in the kernel.
    assert max(in_between) <= 2 * UNSENT_BYTES + 10 * RECEIVE_BUFFER
