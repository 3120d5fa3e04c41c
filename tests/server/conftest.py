"""Real uvicorn on a real socket around the engine without a model."""

from __future__ import annotations

import asyncio
import gzip
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.server.app import Server, Service, create_app
from tests.server.fake_engine import FakeEngine

LIMIT_S = 30
"""Longer than anything takes on a busy machine."""


def png(width: int = 64, height: int = 64) -> bytes:
    ramp = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) % 251
    return saved(ramp.astype(np.uint8))


def saved(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def init(**fields: Any) -> dict[str, Any]:
    """A small session."""
    message = {"type": "init", "prompt": "A quiet street.", "first_frame": png(), "size": "64x64", "fps": 16}
    return message | {"num_frames": 9, "realtime_output_format": "raw"} | fields


def event(kind: str, payload: Any = None, event_id: int | None = None) -> dict[str, Any]:
    message = {"type": "event", "kind": kind, "payload": payload}
    return message if event_id is None else message | {"event_id": event_id}


def state(*keys: str) -> dict[str, Any]:
    return {"mode": "state", "transitions": [{"actions": list(keys), "client_ts_ms": 0}]}


async def wait_until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass
class Chunk:
    frames: list[np.ndarray] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


class Client:
    """Reads the wire from its tables alone."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen: list[dict[str, Any]] = []  # what came beside frames and stats, and all after `closed`
        self._last: np.ndarray | None = None

    async def send(self, message: dict[str, Any]) -> None:
        await self.socket.send(msgspec.msgpack.encode(message))

    async def receive(self) -> tuple[dict[str, Any], bytes | None]:
        async with asyncio.timeout(LIMIT_S):
            message = msgspec.msgpack.decode(await self.socket.recv())
            if message["type"] == "frame_batch_header":
                payload = await self.socket.recv()
                assert isinstance(payload, bytes)
                return message, payload
        return message, message.pop("payload", None)

    async def error(self) -> dict[str, Any]:
        """The next message, which must be an error."""
        message, _ = await self.receive()
        assert message["type"] == "error", message
        return message

    async def until(self, kind: str) -> dict[str, Any]:
        while True:
            message, _ = await self.receive()
            if message["type"] == kind:
                return message

    async def chunk(self) -> Chunk:
        chunk = Chunk()
        while True:
            message, payload = await self.receive()
            if message["type"] == "chunk_stats":
                chunk.stats = message
                return chunk
            if payload is None:
                self.seen.append(message)
                continue
            assert message["total_size"] == len(payload)
            chunk.headers.append(message)
            chunk.frames.extend(self._decode(message, payload))

    def _decode(self, header: dict[str, Any], payload: bytes) -> list[np.ndarray]:
        shape = (header["num_frames"], header["height"], header["width"], 3)
        if header["encoding"] == "raw":
            return list(np.frombuffer(payload, np.uint8).reshape(shape))
        if header["encoding"] == "delta-gzip":
            frames = []
            last = self._last if header.get("delta_reference") == "previous-frame" else np.zeros(shape[1:], np.uint8)
            for delta in np.frombuffer(gzip.decompress(payload), np.uint8).reshape(shape):
                assert last is not None
                last = last ^ delta
                frames.append(last)
            self._last = last
            return frames
        ends = np.cumsum([0, *header["payload_lengths"]])
        parts = [payload[a:b] for a, b in pairwise(ends)]
        return [np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts]

    async def closed(self) -> tuple[int | None, str]:
        """Reads on to the end; the close code and reason."""
        with suppress(ConnectionClosed):
            while True:
                self.seen.append((await self.receive())[0])
        return self.socket.close_code, self.socket.close_reason or ""


@dataclass
class Running:
    """A server that listens."""

    port: int
    engine: FakeEngine
    service: Service
    server: Server

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}{ENDPOINT}"

    @asynccontextmanager
    async def client(self, *messages: dict[str, Any], path: str = "", **options: Any) -> AsyncIterator[Client]:
        async with connect(self.ws + path, max_size=None, compression=None, **options) as socket:
            client = Client(socket)
            for message in messages:
                await client.send(message)
            yield client

    async def idle(self) -> None:
        """Returns once nothing is left of any session."""
        await wait_until(lambda: not (self.service.connections or self.service.admission.is_busy or self.engine.live))


class QuickServer(Server):
    """The server. It looks for the end every 5 ms instead of every 100 ms, and ends at once when nobody is there."""

    async def main_loop(self) -> None:
        for counter in count():
            if await self.on_tick(counter):
                return
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.server_state.connections:
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()
        await self.lifespan.shutdown()


Serve = Callable[..., Awaitable[Running]]


@asynccontextmanager
async def running(engine: FakeEngine, page: Path | None = None, **options: Any) -> AsyncIterator[Running]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = ServeConfig(port=0, log_level="warning", **options)
        app = create_app(config, engine, page=page)
        server = QuickServer(app, config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await wait_until(lambda: server.started or task.done())
            assert not task.done(), task.result()
            it = Running(listener.getsockname()[1], engine, app.state.service, server)
            yield it
            await wait_until(lambda: not it.service.connections)
        finally:
            server.should_exit = True
            await task


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """``await serve(engine, option=...)`` -> a running server that ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine | None = None, **options: Any) -> Running:
            return await stack.enter_async_context(running(engine or FakeEngine(), **options))

        yield start
