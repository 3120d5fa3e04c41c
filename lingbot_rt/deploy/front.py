"""The front of many replicas: one address with the page, the HTTP API and the WebSocket. No torch.

Each replica is a complete server with one engine. A client's init is read here. When a replica is free, the client's
messages go on to it and the replica's go back, as they are, until one side closes. So a session stays on its replica,
and everything that a server promises of a session holds here too.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.middleware.cors import CORSMiddleware

import lingbot_rt
from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.deploy.relay import Line, Pool, Relay
from lingbot_rt.deploy.summary import merged_entry, merged_metrics
from lingbot_rt.errors import LingbotError, Unauthorized
from lingbot_rt.server.access import KnownHosts, has_key, may_connect
from lingbot_rt.server.app import page_folder
from lingbot_rt.server.middleware import BrowserHeaders, HeadAsGet, HostCheck, openai_error, page_policy
from lingbot_rt.session.server_messages import error_message

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

    app = FastAPI(title="lingbot_rt", version=lingbot_rt.__version__, lifespan=lifespan, openapi_url=None)
    app.state.service = front
    app.add_exception_handler(HTTPException, _refused)
    folder = page_folder()
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET"], allow_headers=["*"]
    )
    app.add_middleware(HostCheck, hosts=KnownHosts(config))
    app.add_middleware(BrowserHeaders, page_policy=page_policy(config, folder))
    app.include_router(_routes(front))
    app.add_api_websocket_route(ENDPOINT, _socket_of(front))

    @app.websocket("/{path:path}")
    async def unknown(websocket: WebSocket, path: str) -> None:
        text = f"there is no WebSocket at {'/' + path[:100]!r}, it is at {ENDPOINT}"
        await websocket.send_denial_response(openai_error(404, text, kind="invalid_request_error", code="not_found"))

    if folder is not None:
        app.mount("/", StaticFiles(directory=folder, html=True))
    return app


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = openai_error(error.status_code, error.detail, kind="authentication_error", code="invalid_api_key")
    answer.headers.update(error.headers or {})
    return answer


async def _start(front: Front) -> None:
    try:
        await front.engine.start()
    except LingbotError as error:
        log.error("the replicas did not start: %s", error)
        front.failure = error


def _routes(front: Front) -> APIRouter:
    def check_key(request: Request) -> None:
        if not has_key(front.config, request.headers):
            raise HTTPException(401, str(Unauthorized()), headers={"WWW-Authenticate": "Bearer"})

    routes, keyed = APIRouter(), APIRouter(dependencies=[Depends(check_key)])

    @routes.get("/health")
    async def health() -> JSONResponse:
        status = front.engine.status
        return JSONResponse(status.as_dict(), status_code=200 if status.ready else 503)

    @routes.get("/liveness")
    async def liveness() -> dict[str, str]:
        return {"status": "alive"}

    @keyed.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = await front.entry()
        return {"object": "list", "data": [] if entry is None else [entry]}

    @keyed.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> JSONResponse:
        entry = await front.entry()
        if entry is None or entry["id"] != model_id:
            text = f"the model {model_id[:100]!r} does not exist, see /v1/models"
            return openai_error(404, text, kind="invalid_request_error", code="model_not_found")
        return JSONResponse(entry)

    @keyed.get("/metrics")
    async def metrics() -> Response:
        return Response(await front.metrics(), media_type=CONTENT_TYPE_LATEST)

    routes.include_router(keyed)
    return routes


def _socket_of(front: Front) -> Callable[[WebSocket], Awaitable[None]]:
    async def generate(websocket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):
            if not may_connect(front.config, websocket.headers):
                text = f"Origin {websocket.headers['origin'][:100]!r} may not connect (--cors-allow-origins)"
                await websocket.send_denial_response(
                    openai_error(403, text, kind="invalid_request_error", code="origin_refused")
                )
                return
            await websocket.accept()
            if not has_key(front.config, websocket.headers, websocket.query_params):
                await websocket.send_bytes(error_message(Unauthorized()))
                await websocket.close(1008, "unauthorized")
                return
            relay = Relay(websocket, front.config, front.engine, front.line)
            front.connections.add(relay)
            try:
                await relay.run()
            finally:
                front.connections.discard(relay)

    return generate
