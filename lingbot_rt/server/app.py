"""The ASGI application and the uvicorn server that runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import EngineFailed, LingbotError
from lingbot_rt.server.admission import Admission
from lingbot_rt.server.connection import Connection
from lingbot_rt.server.http import ShortageLog, http_protocol, raise_descriptor_limit
from lingbot_rt.server.model_entry import model_entry
from lingbot_rt.server.parking import Parking
from lingbot_rt.server.profiles import Profiles, profile_routes
from lingbot_rt.server.routes import (
    add_socket,
    base_app,
    keyed_routes,
    mount_page,
    no_such_model,
    open_routes,
    page_folder,
    public_status,
)
from lingbot_rt.server.service import Service
from lingbot_rt.server.turns import Turns
from lingbot_rt.server.websocket import websocket_protocol
from lingbot_rt.session.plan import EnginePort, ModelInfo
from lingbot_rt.telemetry import Metrics
from lingbot_rt.telemetry.tracing import open_tracing

log = logging.getLogger(__name__)

SHUTDOWN_LIMIT_S = 3.0

CLOSE_HANDSHAKE_S = 0.3
"""How long clients have to answer the close at a shutdown."""

FAILURE_SHOWN_S = 1.0
"""How long /health shows why a running engine failed, before the server ends."""

ENCODER_THREADS = 2

ACCEPT_BACKLOG = 256
"""Connections that the kernel keeps waiting. While descriptors are short, asyncio tries as many accepts in a row."""


def create_app(config: ServeConfig, engine: EnginePort, page: Path | None = None) -> FastAPI:
    """The whole server. ``page`` is the folder of the web page (default: the package's own).

    ``app.state.service.failure`` holds the error if the engine did not start, hangs or lost its device or a rank.
    Raises ConfigError when --allowed-hosts or --trace-endpoint is wrong.
    """
    tracing = open_tracing(config.trace_endpoint)
    encoders = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="batches")
    admission = Admission(config.session_wait_s, config.max_waiting, slots=config.max_sessions)
    service = Service(config, engine, admission, Metrics(), encoders, Parking(config, engine), Turns(admission))
    service.tracer = None if tracing is None else tracing.tracer

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The model loads in the background, so that /health answers meanwhile.
        starting = asyncio.create_task(_start(service), name="engine start")
        yield
        await service.close_all(SHUTDOWN_LIMIT_S)
        starting.cancel()
        if engine.status.ready:
            await service.parking.close()
        await engine.stop()
        encoders.shutdown(wait=False, cancel_futures=True)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    folder = page or page_folder()
    app = base_app(config, folder, lifespan)
    app.state.service = service
    app.include_router(open_routes(lambda: engine.status))
    app.include_router(_api(service, app))
    add_socket(app, config, lambda socket: Connection(socket, service).run())
    mount_page(app, folder)
    return app


async def _start(service: Service) -> None:
    try:
        await service.parking.find()
        await service.engine.start()
        service.parking.started()
        # What was loaded stays. A full collection that walks all of it holds up every client for half a second.
        gc.freeze()
    except LingbotError as error:
        log.error("the engine did not start: %s", error)
        service.failure = error


def _info(engine: EnginePort) -> ModelInfo | None:
    """None while the model loads."""
    try:
        return engine.model_info
    except LingbotError:
        return None


def _api(service: Service, app: FastAPI) -> APIRouter:
    routes = keyed_routes(service.config)

    def entry() -> dict[str, Any]:
        engine = service.engine
        admission = service.admission
        return model_entry(
            service.config,
            _info(engine),
            public_status(engine.status),
            warm_sizes=engine.warm_sizes,
            busy=admission.is_busy,
            waiting=admission.waiting,
        )

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @routes.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        found = entry()
        if model_id != found["id"]:
            raise no_such_model(model_id, found["id"])
        return found

    @routes.get("/metrics")
    async def metrics() -> Response:
        service.show_metrics()
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    routes.include_router(profile_routes(Profiles(service.config, service.engine)))

    @routes.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    return routes


class Server(uvicorn.Server):
    """uvicorn, but clients are told before their sockets close, and a lost engine ends the server."""

    def __init__(self, app: FastAPI, config: ServeConfig) -> None:
        self._service: Service = app.state.service
        self._ends_at = 0.0
        raise_descriptor_limit()
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=http_protocol(config),
                backlog=ACCEPT_BACKLOG,
                ws=websocket_protocol(config),
                ws_max_size=config.max_message_mb * 2**20,
                ws_per_message_deflate=False,
                log_config=None,
                log_level=config.log_level,
                timeout_graceful_shutdown=1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(ShortageLog())
        await super().startup(sockets)
        if not hasattr(socket, "TCP_USER_TIMEOUT"):
            return
        # The kernel drops peers that acknowledge nothing. Without it, the data buffered for a client that stopped
        # reading would stay as long as the client does. Accepted sockets inherit the option.
        limit_ms = int(2000 * self._service.config.send_timeout_s)
        for server in self.servers:
            for listener in server.sockets:
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)

    async def on_tick(self, counter: int) -> bool:
        status = self._service.engine.status
        if status.stage == "failed" and self._service.failure is None:
            self._service.failure = EngineFailed(status.detail)
            self._ends_at = time.monotonic() + FAILURE_SHOWN_S
            for connection in list(self._service.connections):
                connection.stop()
        is_over = self._service.failure is not None and time.monotonic() >= self._ends_at
        return await super().on_tick(counter) or is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        had_clients = bool(self._service.connections)
        await self._service.close_all(SHUTDOWN_LIMIT_S)
        if had_clients:
            # A client that answers the close on a socket that is gone may throw away what it has not read yet.
            await asyncio.sleep(CLOSE_HANDSHAKE_S)
        await super().shutdown(sockets)
