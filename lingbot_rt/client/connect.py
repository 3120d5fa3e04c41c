"""``connect``: opens a blocking session under ``with`` and an async one under ``async with``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidProxy, InvalidStatus, ProxyError, WebSocketException
from websockets.sync.client import connect as connect_blocking

from lingbot_rt.client.address import proxy_for
from lingbot_rt.client.kept import NEEDED_EXTENSIONS, resume_fields
from lingbot_rt.client.protocol import init_fields
from lingbot_rt.client.server_info import served_model, server_at
from lingbot_rt.client.sessions import AsyncSession, Session
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


class connect:
    """Opens a session at ``url`` (``http://host:port``, ``ws://host:port`` or the endpoint itself).

    Another host is reached through the proxy that the environment names, a loopback address directly.

    ``init`` takes the arguments of ``protocol.init_fields``: prompt, first_frame, script and any field of the wire. A
    name that is none of them raises InitRefused at once. Without ``size`` the session has the served model's own.
    ``resume`` goes on with a kept world instead: the file that ``save`` wrote, its bytes, or a session's token. Beside
    it stand the fields of ``kept.RESUME_FIELDS`` only.

    If the server keeps worlds, the session comes back by itself after a lost line. For that the init names
    ``kept.NEEDED_EXTENSIONS``, unless it has ``protocol_extensions`` of the caller's: then exactly those.

    Entering raises ConnectFailed. If the server refuses the init, the first iteration raises the error.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, resume: str | Path | bytes | None = None, **init: Any
    ) -> None:
        self._server = server_at(url)
        self._proxy = proxy_for(self._server)
        self._init = init_fields(**init) if resume is None else resume_fields(resume, **_without_script(init))
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
        self._blocking = Session(self, self.dial(self._message()))
        return self._blocking

    def __exit__(self, *error: object) -> None:
        self._blocking.close()

    async def __aenter__(self) -> AsyncSession:
        self._async = AsyncSession(self, await self.dial_async(await asyncio.to_thread(self._message)))
        return self._async

    async def __aexit__(self, *error: object) -> None:
        await self._async.close()

    def dial(self, message: bytes) -> BlockingConnection:
        """A new line to the server, with ``message`` on it. Raises ConnectFailed."""
        with self._named_errors():
            socket = connect_blocking(self._server.socket_url, **self._options)
        # A server that refuses the client sends an error and closes, perhaps before it reads the init. The first
        # iteration raises that error.
        with suppress(ConnectionClosed):
            socket.send(message)
        return socket

    async def dial_async(self, message: bytes) -> AsyncConnection:
        """As ``dial``."""
        with self._named_errors():
            socket = await connect_async(self._server.socket_url, **self._options)
        with suppress(ConnectionClosed):
            await socket.send(message)
        return socket

    def _message(self) -> bytes:
        """The message that begins.

        Asks the server for what the caller left out: its size, since the wire's default is the 14B's, and its
        extensions. A server that does not tell them gets neither.
        """
        init = dict(self._init)
        if "size" not in init or "protocol_extensions" not in init:
            served = served_model(self._url, self._api_key)
            if "resume" not in init and "size" not in init and served.size is not None:
                init["size"] = str(served.size)
            if "protocol_extensions" not in init and set(NEEDED_EXTENSIONS) <= served.extensions:
                init["protocol_extensions"] = list(NEEDED_EXTENSIONS)
        return msgspec.msgpack.encode(init)

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


def _without_script(init: dict[str, Any]) -> dict[str, Any]:
    """``script=None`` says that an init has none; beside ``resume`` it says nothing."""
    return {name: value for name, value in init.items() if name != "script" or value is not None}
