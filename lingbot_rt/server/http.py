"""The HTTP transport: uvicorn's, with a limit to the time of a request and to the number of connections."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from contextlib import suppress
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lingbot_rt.config import ServeConfig

try:
    import resource
except ImportError:  # no POSIX
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

REQUEST_LIMIT_S = 10.0
"""Seconds within which a connection must send a complete request: after it opened, and after each answer."""

REFUSED_LIMIT_S = 1.0
"""Seconds that a connection beyond the limit may stay until it sends something, so that it can read its answer."""

RESERVED_DESCRIPTORS = 64
"""File descriptors that connections leave to everything else."""

LOG_INTERVAL_S = 60.0
"""Between two log lines about the same shortage."""

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Seldom:
    """Says at most once per LOG_INTERVAL_S that it is time for a log line."""

    def __init__(self) -> None:
        self._last = -LOG_INTERVAL_S

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < LOG_INTERVAL_S:
            return False
        self._last = now
        return True


def http_protocol(config: ServeConfig) -> type[HttpProtocol]:
    """The protocol class that uvicorn makes one of for each connection."""

    class Configured(HttpProtocol):
        max_connections = _connections_within(config.max_connections)
        refusal = Seldom()

    return Configured


class HttpProtocol(H11Protocol):
    """Closes a connection that does not send a complete request in time, and refuses those beyond ``max_connections``.

    WebSockets count among the connections. Their own limits hold from the handshake on.
    """

    max_connections: ClassVar[int] = 1000
    refusal: ClassVar[Seldom] = Seldom()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._is_refused = len(self.connections) > self.max_connections
        if not self._is_refused:
            self._expect_request(REQUEST_LIMIT_S)
            return
        self.connections.discard(self)
        self._expect_request(REFUSED_LIMIT_S)
        if self.refusal.is_due():
            log.warning("%d connections are open: more are refused (--max-connections)", self.max_connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            # Answered only now: a close before the request is read would reset the connection, and hide the answer.
            self._overdue()
            return
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._expect_request(REQUEST_LIMIT_S)
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._expect_nothing()
        super().handle_websocket_upgrade(event)

    def _expect_request(self, limit_s: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(limit_s, self._overdue)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _overdue(self) -> None:
        if self.transport.is_closing():
            return
        if self._is_refused:
            self._end_with("503 Service Unavailable", "too many connections (--max-connections), try again later")
        elif self.cycle is not None and not self.cycle.response_complete:
            self._expect_request(REQUEST_LIMIT_S)  # a request is being answered
        elif self.conn.trailing_data[0]:
            self._end_with("408 Request Timeout", f"no complete request came within {REQUEST_LIMIT_S:g} s")
        else:
            self.transport.close()

    def _end_with(self, status: str, text: str) -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(text)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{text}".encode())
        self.transport.close()


def raise_descriptor_limit() -> None:
    """Lets this process open as many files as the system allows it."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports no hard limit and refuses more than this number of its own.
    for wanted in (hard, 10240):
        if wanted == soft:
            return
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def _connections_within(wanted: int) -> int:
    """``wanted`` connections, or as many as this process has descriptors for."""
    if resource is None:
        return wanted
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY or wanted + RESERVED_DESCRIPTORS <= descriptors:
        return wanted
    fitting = max(descriptors - RESERVED_DESCRIPTORS, 1)
    log.warning("--max-connections %d: only %d, as the limit of open files is %d", wanted, fitting, descriptors)
    return fitting


class ShortageLog:
    """The event loop's exception handler: one line, not thousands of tracebacks, while descriptors are short."""

    def __init__(self) -> None:
        self._shortage = Seldom()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_RESOURCES:
            loop.default_exception_handler(context)
        elif self._shortage.is_due():
            log.error("a new connection has to wait: %s (ulimit -n, --max-connections)", error.strerror)
