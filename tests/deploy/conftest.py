"""A front on a real socket, with servers around engines without a model as its replicas. No Ray."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.deploy.front import Front, create_front
from lingbot_rt.session.plan import EngineStatus
from tests.server.conftest import Client, QuickServer, Running, running, wait_until
from tests.server.fake_engine import FakeEngine


class FakeLease:
    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self._address = ""

    async def acquire(self) -> str:
        self._address = await self._pool.free.get()
        return self._address

    async def release(self) -> None:
        if self._address:
            self._pool.free.put_nowait(self._address)
            self._address = ""


class FakePool:
    """Replicas that this test process runs."""

    def __init__(self, addresses: list[str]) -> None:
        self.known = addresses
        self.free: asyncio.Queue[str] = asyncio.Queue()
        self.status = EngineStatus("starting")
        for address in addresses:
            self.free.put_nowait(address)

    async def start(self) -> None:
        self.status = EngineStatus("ready")

    async def stop(self) -> None:
        self.status = EngineStatus("stopped")

    def lease(self) -> FakeLease:
        return FakeLease(self)

    async def addresses(self) -> list[str]:
        return self.known


@dataclass
class Fronted:
    """A front and its replicas."""

    port: int
    front: Front
    pool: FakePool
    replicas: list[Running] = field(default_factory=list)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def client(self, *messages, **options) -> AsyncIterator[Client]:
        """A wire client of the front, which leaves without a word: frames that nobody read would hold up a close."""
        async with Running.client(self, *messages, **options) as client:
            try:
                yield client
            finally:
                client.socket.transport.abort()

    ws = Running.ws


@asynccontextmanager
async def fronted(count: int = 2, addresses: tuple[str, ...] = (), **options) -> AsyncIterator[Fronted]:
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(running(FakeEngine(), **options)) for _ in range(count)]
        pool = FakePool([*(f"127.0.0.1:{replica.port}" for replica in replicas), *addresses])
        config = ServeConfig(port=0, log_level="warning", **options)
        app = create_front(config, pool)
        server = QuickServer(app, config)
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await wait_until(lambda: server.started and pool.status.ready)
            yield Fronted(listener.getsockname()[1], app.state.service, pool, replicas)
        finally:
            server.should_exit = True
            await task


@pytest.fixture
async def front() -> AsyncIterator:
    """``await front(2, option=...)`` -> a front with two replicas that ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(count: int = 2, **options) -> Fronted:
            return await stack.enter_async_context(fronted(count, **options))

        yield start
