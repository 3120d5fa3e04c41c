"""The ASGI application and the uvicorn server that runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
import mimetypes
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
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
from lingbot_rt.errors import EngineFailed, LingbotError, Unauthorized
from lingbot_rt.server.access import has_key, may_connect
from lingbot_rt.server.admission import Admission
from lingbot_rt.server.connection import Connection, Service
from lingbot_rt.server.model_entry import model_entry
from lingbot_rt.server.websocket import websocket_protocol
from lingbot_rt.session.messages import error_message
from lingbot_rt.session.plan import EnginePort, ModelInfo
from lingbot_rt.telemetry import Metrics

log = logging.getLogger(__name__)

SHUTDOWN_LIMIT_S = 3.0

CLOSE_HANDSHAKE_S = 0.3
"""How long clients have to answer the close at a shutdown."""

ENCODER_THREADS = 2

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

    ``app.state.service.failure`` holds the error if the engine did not start or lost one of its ranks.
    """
    encoders = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="batches")
    service = Service(config, engine, Admission(config.session_wait_s), Metrics(), encoders)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The model loads in the background, so that /health answers meanwhile.
        starting = asyncio.create_task(_start(service), name="engine start")
        yield
        await service.close_all(SHUTDOWN_LIMIT_S)
        starting.cancel()
        await engine.stop()
        encoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="lingbot_rt", version=lingbot_rt.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_exception_handler(HTTPException, _openai_error)
    app.add_middleware(
        CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET"], allow_headers=["*"]
    )
    app.include_router(_open_routes(service))
    app.include_router(_keyed_routes(service))
    _add_socket(app, service)
    folder = page or page_folder()
    if folder is not None:
        for suffix, kind in _MIME_TYPES.items():
            mimetypes.add_type(kind, suffix)
        app.mount("/", _Page(directory=folder, html=True))
    return app


async def _start(service: Service) -> None:
    try:
        await service.engine.start()
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


def _open_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        status = service.engine.status
        return JSONResponse(status.as_dict(), status_code=200 if status.ready else 503)

    @routes.get("/liveness")
    async def liveness() -> dict[str, str]:
        return {"status": "alive"}

    return routes


def _keyed_routes(service: Service) -> APIRouter:
    def check_key(request: Request) -> None:
        if not has_key(service.config, request.headers):
            raise HTTPException(401, str(Unauthorized()), headers={"WWW-Authenticate": "Bearer"})

    routes = APIRouter(dependencies=[Depends(check_key)])

    def entry() -> dict[str, Any]:
        engine = service.engine
        return model_entry(service.config, _info(engine), engine.status, busy=service.admission.is_busy)

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
        service.metrics.ready.set(service.engine.status.ready)
        service.metrics.waiting.set(service.admission.waiting)
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return routes


def _add_socket(app: FastAPI, service: Service) -> None:
    @app.websocket(ENDPOINT)
    async def generate(websocket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):
            if not may_connect(service.config, websocket.headers):
                await websocket.close(1008)  # before accept: the handshake is answered with 403
                return
            await websocket.accept()
            if not has_key(service.config, websocket.headers, websocket.query_params):
                # After accept: a page cannot read why a handshake failed.
                await websocket.send_bytes(error_message(Unauthorized()))
                await websocket.close(1008, "unauthorized")
                return
            await Connection(websocket, service).run()


_OPENAI_ERRORS = {401: ("authentication_error", "invalid_api_key"), 404: ("invalid_request_error", "model_not_found")}


async def _openai_error(request: Request, error: Exception) -> JSONResponse:
    """An HTTP error in the form that OpenAI clients read."""
    assert isinstance(error, HTTPException)
    kind, code = _OPENAI_ERRORS.get(error.status_code, ("invalid_request_error", None))
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


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
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                ws=websocket_protocol(config),
                ws_max_size=config.max_message_mb * 2**20,
                ws_per_message_deflate=False,
                log_config=None,
                log_level=config.log_level,
                timeout_graceful_shutdown=1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
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
        return await super().on_tick(counter) or self._service.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        had_clients = bool(self._service.connections)
        await self._service.close_all(SHUTDOWN_LIMIT_S)
        if had_clients:
            # A client that answers the close on a socket that is gone may throw away what it has not read yet.
            await asyncio.sleep(CLOSE_HANDSHAKE_S)
        await super().shutdown(sockets)
