"""What holds for every answer of the server: which host names it goes by, HEAD, and headers for browsers."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import WebSocket
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lingbot_rt.config import ServeConfig
from lingbot_rt.server.access import KnownHosts

_META_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')


def openai_error(status: int, message: str, *, kind: str, code: str | None = None) -> JSONResponse:
    """An HTTP error in the form that OpenAI clients read."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


class HostCheck:
    """Refuses requests and WebSockets whose ``Host`` is not a name of this server."""

    def __init__(self, app: ASGIApp, hosts: KnownHosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] in ("http", "websocket") else None
        if self._hosts.knows(host):
            await self._app(scope, receive, send)
            return
        refusal = openai_error(
            403,
            f"Host {str(host)[:100]!r}: this server is not known by that name (--allowed-hosts adds names)",
            kind="invalid_request_error",
            code="unknown_host",
        )
        if scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(refusal)


class HeadAsGet:
    """Answers HEAD with the status and headers of GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


class BrowserHeaders:
    """Adds the headers that keep browsers from guessing types, and foreign pages from framing this one."""

    def __init__(self, app: ASGIApp, page_policy: str) -> None:
        self._app = app
        self._page_policy = page_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                if headers.get("content-type", "").startswith("text/html"):
                    headers["Content-Security-Policy"] = self._page_policy
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def page_policy(config: ServeConfig, page: Path | None) -> str:
    """The Content-Security-Policy of the page in the folder ``page``: that of its meta element, and who may frame it.

    A meta element cannot say the latter. Pages of the allowed origins may, unless all origins are allowed.
    """
    index = page / "index.html" if page is not None else None
    found = _META_POLICY.search(index.read_text(encoding="utf-8")) if index is not None and index.is_file() else None
    policy = found[1] if found is not None else "base-uri 'none'; object-src 'none'"
    origins = [origin for origin in config.allowed_origins if origin != "*"]
    return "; ".join((policy.rstrip("; "), " ".join(("frame-ancestors 'self'", *origins))))
