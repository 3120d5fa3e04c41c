"""The front of many replicas: one address with the page, the HTTP API and the WebSocket. No torch.

Each replica is a complete server with one engine. A client's init is read here. When a replica is free, the client's
messages go on to it and the replica's go back, as they are, until one side closes. So a session stays on its replica,
and everything that a server promises of a session holds here too.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Response, WebSocket
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from lingbot_rt.config import ServeConfig
from lingbot_rt.deploy.relay import Line, Pool, Relay
from lingbot_rt.deploy.summary import merged_entry, merged_metrics
from lingbot_rt.errors import LingbotError
from lingbot_rt.server.routes import (
    add_socket,
    base_app,
    keyed_routes,
    mount_page,
    no_such_model,
    open_routes,
    page_folder,
)

log = logging.getLogger(__name__)

REPLY_LIMIT_S = 3.0
"""How long the front waits for what a replica says of itself."""

MAX_REPLY_BYTES = 2**22
"""Most bytes that are read of it."""

SHUTDOWN_LIMIT_S = 3.0
"""How long clients have to hear that the server ends."""


@dataclass(eq=False)
class Front:
    """What all connections share. It has what ``server.app.Server`` asks of a service."""

    config: ServeConfig
    engine: Pool
    line: Line = field(default_factory=Line)
    connections: set[Relay] = field(default_factory=set)
    failure: LingbotError | None = None

    async def close_all(self, limit_s: float) -> None:
        """Every client gets its error and its close. Returns when all are gone, after ``limit_s`` at the latest."""
        leaving = list(self.connections)
        for relay in leaving:
            relay.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for relay in leaving:
                    await relay.gone.wait()

    async def serve(self, client: WebSocket) -> None:
        """One that was accepted."""
        relay = Relay(client, self.config, self.engine, self.line)
        self.connections.add(relay)
        try:
            await relay.run()
        finally:
            self.connections.discard(relay)

    async def replies(self, path: str) -> dict[str, bytes]:
        """The body of a GET of ``path`` at each replica, by address. Those that do not answer in time are left out."""
        asked = await self.engine.addresses()
        bodies = await asyncio.gather(*(self._reply(address, path) for address in asked))
        return {address: body for address, body in zip(asked, bodies, strict=True) if body is not None}

    async def _reply(self, address: str, path: str) -> bytes | None:
        try:
            return await asyncio.to_thread(_get, address, path, self.config.api_key)
        except (OSError, http.client.HTTPException) as error:
            log.warning("the replica at %s does not answer %s: %r", address, path, error)
            return None

    async def entry(self) -> dict[str, Any] | None:
        """The entry of /v1/models; None while no replica answers."""
        bodies = await self.replies("/v1/models")
        return merged_entry(
            (entry for body in bodies.values() for entry in msgspec.json.decode(body)["data"]), waiting=self.line.length
        )

    async def metrics(self) -> str:
        """The metrics of all replicas and of the front."""
        texts = await self.replies("/metrics")
        registry = CollectorRegistry()
        for name, meaning, value in (
            ("replicas", "replicas that answer", len(texts)),
            ("waiting_clients", "clients in line for a free replica", self.line.length),
            ("relayed_sessions", "clients that have a replica", sum(each.has_replica for each in self.connections)),
        ):
            Gauge(f"lingbot_rt_front_{name}", meaning, registry=registry).set(value)
        return generate_latest(registry).decode() + merged_metrics(
            {address: text.decode() for address, text in texts.items()}
        )


def _get(address: str, path: str, api_key: str | None) -> bytes | None:
    """The body of a GET; None unless the status is 200. Raises OSError and HTTPException."""
    connection = http.client.HTTPConnection(address, timeout=REPLY_LIMIT_S)
    try:
        connection.request("GET", path, headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"})
        answer = connection.getresponse()
        body = answer.read(MAX_REPLY_BYTES)
        return body if answer.status == http.client.OK else None
    finally:
        connection.close()


def create_front(config: ServeConfig, pool: Pool) -> FastAPI:
    """The application. ``app.state.service.failure`` holds the error if the replicas did not start."""
    front = Front(config, pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(front), name="replicas start")
        yield
        await front.close_all(SHUTDOWN_LIMIT_S)
        starting.cancel()
        await pool.stop()

    folder = page_folder()
    app = base_app(config, folder, lifespan)
    app.state.service = front
    app.include_router(open_routes(lambda: pool.status))
    app.include_router(_api(front))
    add_socket(app, config, front.serve)
    mount_page(app, folder)
    return app


async def _start(front: Front) -> None:
    try:
        await front.engine.start()
    except LingbotError as error:
        log.error("the replicas did not start: %s", error)
        front.failure = error


def _api(front: Front) -> APIRouter:
    routes = keyed_routes(front.config)

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = await front.entry()
        return {"object": "list", "data": [] if entry is None else [entry]}

    @routes.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        entry = await front.entry()
        if entry is None or entry["id"] != model_id:
            raise no_such_model(model_id, None if entry is None else entry["id"])
        return entry

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(await front.metrics(), media_type=CONTENT_TYPE_LATEST)

    return routes
