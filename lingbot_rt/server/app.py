"""The ASGI application and the uvicorn server that runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
import mimetypes
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

import lingbot_rt
from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.errors import EngineFailed, LingbotError, Unauthorized, public_text
from lingbot_rt.server.access import KnownHosts, has_key, may_connect
from lingbot_rt.server.admission import Admission
from lingbot_rt.server.connection import Connection
from lingbot_rt.server.http import ShortageLog, http_protocol, raise_descriptor_limit
from lingbot_rt.server.middleware import BrowserHeaders, HeadAsGet, HostCheck, openai_error, page_policy
from lingbot_rt.server.model_entry import model_entry
from lingbot_rt.server.parking import Parking
from lingbot_rt.server.profiles import Profiles, profile_routes
from lingbot_rt.server.service import Service
from lingbot_rt.server.turns import Turns
from lingbot_rt.server.websocket import websocket_protocol
from lingbot_rt.session.plan import EnginePort, EngineStatus, ModelInfo
from lingbot_rt.session.server_messages import error_message
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

_MIME_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
"""Some systems' tables say text/plain for scripts, and browsers refuse to run those."""


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

    app = FastAPI(title="lingbot_rt", version=lingbot_rt.__version__, lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(HTTPException, _openai_error)
    folder = page or page_folder()
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET"], allow_headers=["*"]
    )
    app.add_middleware(HostCheck, hosts=KnownHosts(config))
    app.add_middleware(BrowserHeaders, page_policy=page_policy(config, folder))  # the outermost
    app.include_router(_open_routes(service))
    app.include_router(_keyed_routes(service, app))
    _add_socket(app, service)
    if folder is not None:
        for suffix, kind in _MIME_TYPES.items():
            mimetypes.add_type(kind, suffix)
        app.mount("/", _Page(directory=folder, html=True))
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


def _public_status(engine: EnginePort) -> EngineStatus:
    status = engine.status
    return replace(status, detail=public_text(status.detail))


def _open_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        status = _public_status(service.engine)
        return JSONResponse(status.as_dict(), status_code=200 if status.ready else 503)

    @routes.get("/liveness")
    async def liveness() -> dict[str, str]:
        return {"status": "alive"}

    @routes.get(ENDPOINT, include_in_schema=False)
    async def no_upgrade() -> JSONResponse:
        answer = openai_error(
            426,
            f"{ENDPOINT} is a WebSocket, and this request carries no Upgrade: open it with a WebSocket client; a proxy "
            "in between must pass the headers Upgrade and Connection",
            kind="invalid_request_error",
            code="upgrade_required",
        )
        answer.headers.update({"Upgrade": "websocket", "Connection": "Upgrade"})
        return answer

    return routes


def _keyed_routes(service: Service, app: FastAPI) -> APIRouter:
    def check_key(request: Request) -> None:
        if not has_key(service.config, request.headers):
            raise HTTPException(401, str(Unauthorized()), headers={"WWW-Authenticate": "Bearer"})

    routes = APIRouter(dependencies=[Depends(check_key)])

    def entry() -> dict[str, Any]:
        engine = service.engine
        admission = service.admission
        return model_entry(
            service.config,
            _info(engine),
            _public_status(engine),
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
            raise HTTPException(404, f"the model {model_id!r} does not exist, this server has {found['id']!r}")
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


def _add_socket(app: FastAPI, service: Service) -> None:
    @app.websocket(ENDPOINT)
    async def generate(websocket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):
            if not may_connect(service.config, websocket.headers):
                text = f"Origin {websocket.headers['origin'][:100]!r} may not connect (--cors-allow-origins)"
                await websocket.send_denial_response(
                    openai_error(403, text, kind="invalid_request_error", code="origin_refused")
                )
                return
            await websocket.accept()
            if not has_key(service.config, websocket.headers, websocket.query_params):
                # After accept: a page cannot read why a handshake failed.
                await websocket.send_bytes(error_message(Unauthorized()))
                await websocket.close(1008, "unauthorized")
                return
            await Connection(websocket, service).run()

    @app.websocket("/{path:path}")
    async def unknown(websocket: WebSocket, path: str) -> None:
        text = f"there is no WebSocket at {'/' + path[:100]!r}, it is at {ENDPOINT}"
        await websocket.send_denial_response(openai_error(404, text, kind="invalid_request_error", code="not_found"))


_OPENAI_ERRORS = {401: ("authentication_error", "invalid_api_key"), 404: ("invalid_request_error", "model_not_found")}


async def _openai_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind, code = _OPENAI_ERRORS.get(error.status_code, ("invalid_request_error", None))
    answer = openai_error(error.status_code, error.detail, kind=kind, code=code)
    answer.headers.update(error.headers or {})
    return answer


def page_folder() -> Path | None:
    """The folder of the web page: inside an installed package, or beside the package in a checkout."""
    package = Path(lingbot_rt.__file__).parent
    candidates = (package / "webui", package.parent / "webui")
    return next((folder for folder in candidates if (folder / "index.html").is_file()), None)


class _Page(StaticFiles):
    """Static files. Browsers ask again before they use a cached one, so an update is seen at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


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
