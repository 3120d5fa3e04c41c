"""What a server answers alike with one engine and as the front of many replicas.

Middleware, errors, the page, the routes without a key, the check of the key, and the way to the WebSocket.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

import lingbot_rt
from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.errors import Unauthorized, public_text
from lingbot_rt.server.access import KnownHosts, has_key, may_connect
from lingbot_rt.server.middleware import BrowserHeaders, HeadAsGet, HostCheck, openai_error, page_policy
from lingbot_rt.session.plan import EngineStatus
from lingbot_rt.session.server_messages import error_message

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


def base_app(
    config: ServeConfig, page: Path | None, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]
) -> FastAPI:
    """An application without routes. Raises ConfigError when --allowed-hosts is wrong."""
    app = FastAPI(title="lingbot_rt", version=lingbot_rt.__version__, lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(HTTPException, _openai_error)
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET"], allow_headers=["*"]
    )
    app.add_middleware(HostCheck, hosts=KnownHosts(config))
    app.add_middleware(BrowserHeaders, page_policy=page_policy(config, page))  # the outermost
    return app


_OPENAI_ERRORS = {401: ("authentication_error", "invalid_api_key"), 404: ("invalid_request_error", "model_not_found")}


async def _openai_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind, code = _OPENAI_ERRORS.get(error.status_code, ("invalid_request_error", None))
    answer = openai_error(error.status_code, error.detail, kind=kind, code=code)
    answer.headers.update(error.headers or {})
    return answer


def public_status(status: EngineStatus) -> EngineStatus:
    return replace(status, detail=public_text(status.detail))


def open_routes(status: Callable[[], EngineStatus]) -> APIRouter:
    """Those that anybody may ask."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        now = public_status(status())
        return JSONResponse(now.as_dict(), status_code=200 if now.ready else 503)

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


def keyed_routes(config: ServeConfig) -> APIRouter:
    """A router for those that need the key."""

    def check_key(request: Request) -> None:
        if not has_key(config, request.headers):
            raise HTTPException(401, str(Unauthorized()), headers={"WWW-Authenticate": "Bearer"})

    return APIRouter(dependencies=[Depends(check_key)])


def no_such_model(model_id: str, known: str | None) -> HTTPException:
    """``known``: the id of the one that is served."""
    served = "no replica has one yet" if known is None else f"this server has {known!r}"
    return HTTPException(404, f"the model {model_id[:100]!r} does not exist, {served}")


def add_socket(app: FastAPI, config: ServeConfig, serve: Callable[[WebSocket], Awaitable[None]]) -> None:
    """``serve`` gets each WebSocket that has been accepted and has the key."""

    @app.websocket(ENDPOINT)
    async def generate(websocket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):
            if not may_connect(config, websocket.headers):
                text = f"Origin {websocket.headers['origin'][:100]!r} may not connect (--cors-allow-origins)"
                await websocket.send_denial_response(
                    openai_error(403, text, kind="invalid_request_error", code="origin_refused")
                )
                return
            await websocket.accept()
            if not has_key(config, websocket.headers, websocket.query_params):
                # After accept: a page cannot read why a handshake failed.
                await websocket.send_bytes(error_message(Unauthorized()))
                await websocket.close(1008, "unauthorized")
                return
            await serve(websocket)

    @app.websocket("/{path:path}")
    async def unknown(websocket: WebSocket, path: str) -> None:
        text = f"there is no WebSocket at {'/' + path[:100]!r}, it is at {ENDPOINT}"
        await websocket.send_denial_response(openai_error(404, text, kind="invalid_request_error", code="not_found"))


def page_folder() -> Path | None:
    """The folder of the web page: inside an installed package, or beside the package in a checkout."""
    package = Path(lingbot_rt.__file__).parent
    candidates = (package / "webui", package.parent / "webui")
    return next((folder for folder in candidates if (folder / "index.html").is_file()), None)


def mount_page(app: FastAPI, folder: Path | None) -> None:
    """For every path that is no route. Called last."""
    if folder is None:
        return
    for suffix, kind in _MIME_TYPES.items():
        mimetypes.add_type(kind, suffix)
    app.mount("/", _Page(directory=folder, html=True))


class _Page(StaticFiles):
    """Static files. Browsers ask again before they use a cached one, so an update is seen at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response
