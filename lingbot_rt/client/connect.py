"""``connect`` and the two sessions it opens: blocking under ``with``, async under ``async with``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidProxy, InvalidStatus, ProxyError, WebSocketException
from websockets.sync.client import connect as connect_blocking

from lingbot_rt.client.address import proxy_for
from lingbot_rt.client.frames import Frame
from lingbot_rt.client.protocol import BaseSession, init_fields
from lingbot_rt.client.server_info import served_size, server_at
from lingbot_rt.config import ENDPOINT
from lingbot_rt.config_values import key_value
from lingbot_rt.errors import ConnectFailed, one_line, reason_of

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection as AsyncConnection
    from websockets.sync.client import ClientConnection as BlockingConnection

_MAX_MESSAGE_BYTES = 512 * 2**20  # enough for 16 raw frames of 3840x2160
_MAX_QUEUED_MESSAGES = 8  # received and not read yet; with more the server waits
_CLOSE_LIMIT_S = 0.5  # the server's close may be stuck behind unread frames, so do not wait long for it
_RETRYABLE_STATUS = (429, 502, 503, 504)


class Session(BaseSession[int], Iterator[Frame]):
    """A blocking session: iterate over its frames, press keys from this thread or another."""

    def __init__(self, socket: BlockingConnection) -> None:
        super().__init__()
        self._socket = socket

    def __next__(self) -> Frame:
        """The next frame; iteration ends with the session. Raises ClientError. The session survives EventRefused."""
        while not self._decoded:
            try:
                self._decoded.extend(self._protocol.receive(self._socket.recv()))
            except ConnectionClosed as end:
                self._protocol.closed(*_close_of(end))
                raise StopIteration from None
        return self._decoded.popleft()

    def _send(self, message: bytes, event_id: int) -> int:
        try:
            self._socket.send(message)
        except ConnectionClosed as end:
            self._protocol.closed(*_close_of(end))
        return event_id


class AsyncSession(BaseSession[Coroutine[Any, Any, int]], AsyncIterator[Frame]):
    """The async session: ``async for frame in session``, ``await session.press("w")``."""

    def __init__(self, socket: AsyncConnection) -> None:
        super().__init__()
        self._socket = socket

    async def __anext__(self) -> Frame:
        """The next frame; iteration ends with the session. Raises ClientError. The session survives EventRefused."""
        while not self._decoded:
            try:
                self._decoded.extend(self._protocol.receive(await self._socket.recv()))
            except ConnectionClosed as end:
                self._protocol.closed(*_close_of(end))
                raise StopAsyncIteration from None
        return self._decoded.popleft()

    async def messages(self) -> AsyncIterator[bytes | str]:
        """In place of frames: every message as it came, not decoded, until the session ends. Raises SessionLost."""
        try:
            while True:
                yield await self._socket.recv()
        except ConnectionClosed as end:
            self._protocol.closed(*_close_of(end))

    async def _send(self, message: bytes, event_id: int) -> int:
        try:
            await self._socket.send(message)
        except ConnectionClosed as end:
            self._protocol.closed(*_close_of(end))
        return event_id


class connect:
    """Opens a session at ``url`` (``http://host:port``, ``ws://host:port`` or the endpoint itself).

    Another host is reached through the proxy that the environment names, a loopback address directly.

    ``init`` takes the arguments of ``protocol.init_fields``: prompt, first_frame, script and any field of the wire. A
    name that is none of them raises InitRefused at once. Without ``size`` the session has the served model's own.
    Entering raises ConnectFailed. If the server refuses the init, the first iteration raises the error.
    """

    def __init__(self, url: str, *, api_key: str | None = None, **init: Any) -> None:
        self._server = server_at(url)
        self._proxy = proxy_for(self._server)
        self._init = init_fields(**init)
        self._url, self._api_key = url, None if api_key is None else _key(api_key)
        self._options: dict[str, Any] = {
            "proxy": self._proxy.url if self._proxy else None,
            "additional_headers": {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            "max_size": _MAX_MESSAGE_BYTES,
            "max_queue": _MAX_QUEUED_MESSAGES,
            "close_timeout": _CLOSE_LIMIT_S,
            "compression": None,
        }

    def __enter__(self) -> Session:
        init = self._message()
        with self._named_errors():
            self._blocking = connect_blocking(self._server.socket_url, **self._options)
        # A server that refuses the client sends an error and closes, perhaps before it reads the init. The first
        # iteration raises that error.
        with suppress(ConnectionClosed):
            self._blocking.send(init)
        return Session(self._blocking)

    def __exit__(self, *error: object) -> None:
        self._blocking.close()

    async def __aenter__(self) -> AsyncSession:
        init = await asyncio.to_thread(self._message)
        with self._named_errors():
            self._async = await connect_async(self._server.socket_url, **self._options)
        with suppress(ConnectionClosed):
            await self._async.send(init)
        return AsyncSession(self._async)

    async def __aexit__(self, *error: object) -> None:
        await self._async.close()

    def _message(self) -> bytes:
        """The init message. Asks the server for its size if the caller named none: the wire's default is the 14B's."""
        size = self._init.get("size") or served_size(self._url, self._api_key)
        return msgspec.msgpack.encode(self._init if size is None else self._init | {"size": str(size)})

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        url = self._server.shown_socket
        way = f" through {self._proxy}" if self._proxy else ""
        try:
            yield
        except InvalidStatus as error:
            status = error.response.status_code
            raise ConnectFailed(
                f"{url} answered HTTP {status}{way}{self._hint(status)}", reconnectable=status in _RETRYABLE_STATUS
            ) from None
        except ImportError:  # the WebSocket library loads python-socks when it needs it
            raise ConnectFailed(
                f"{url}: {self._proxy} needs the package python-socks; no_proxy={self._server.host} connects directly",
                reconnectable=False,
            ) from None
        except OSError as error:
            reason = reason_of(error)
            hint = self._server.start_hint
            raise ConnectFailed(f"{url} does not answer{way}: {reason}{hint}", reconnectable=True) from None
        except (ProxyError, InvalidProxy) as error:
            raise ConnectFailed(f"{url} does not answer{way}: {one_line(error)}", reconnectable=True) from None
        except (WebSocketException, EOFError, ValueError) as error:
            raise ConnectFailed(
                f"{url} does not answer as a WebSocket{way}: expected the address of `lingbot-rt serve` or of a server "
                f"of its kind ({one_line(error)})",
                reconnectable=True,
            ) from None

    def _hint(self, status: int) -> str:
        """What a refused handshake may mean."""
        if self._server.socket_path != self._server.base + ENDPOINT:
            return f": expected the path {ENDPOINT}, or the URL without a path"
        if self._server.base:
            return f": expected a server below {self._server.base}; without that path it is {self._server.root}"
        if status in (401, 403):
            return ": is the api_key right, and may this client use the server?"
        if status in (404, 426):
            return ": expected a lingbot_rt server there, and every proxy on the way to pass WebSockets"
        return ""


def _key(text: str) -> str:
    try:
        return key_value(text)
    except ValueError as error:
        raise ConnectFailed(f"api_key: {error}", reconnectable=False) from None


def _close_of(end: ConnectionClosed) -> tuple[int | None, str]:
    return (end.rcvd.code, end.rcvd.reason) if end.rcvd is not None else (None, "")
