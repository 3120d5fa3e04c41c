"""``connect`` and the two sessions it opens: blocking under ``with``, async under ``async with``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import connect as connect_blocking

from lingbot_rt.client.frames import Frame
from lingbot_rt.client.protocol import BaseSession, init_message, websocket_url
from lingbot_rt.errors import ConnectFailed

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

    async def _send(self, message: bytes, event_id: int) -> int:
        try:
            await self._socket.send(message)
        except ConnectionClosed as end:
            self._protocol.closed(*_close_of(end))
        return event_id


class connect:
    """Opens a session at ``url`` (``http://host:port``, ``ws://host:port`` or the endpoint itself).

    ``init`` takes the arguments of ``protocol.init_message``: prompt, first_frame, script and any field of the wire.
    Entering raises ConnectFailed. If the server refuses the init, the first iteration raises the error.
    """

    def __init__(self, url: str, *, api_key: str | None = None, **init: Any) -> None:
        self._url = websocket_url(url)
        self._init = init_message(**init)
        self._options: dict[str, Any] = {
            "additional_headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            "max_size": _MAX_MESSAGE_BYTES,
            "max_queue": _MAX_QUEUED_MESSAGES,
            "close_timeout": _CLOSE_LIMIT_S,
            "compression": None,
        }

    def __enter__(self) -> Session:
        with self._named_errors():
            self._blocking = connect_blocking(self._url, **self._options)
        self._blocking.send(self._init)
        return Session(self._blocking)

    def __exit__(self, *error: object) -> None:
        self._blocking.close()

    async def __aenter__(self) -> AsyncSession:
        with self._named_errors():
            self._async = await connect_async(self._url, **self._options)
        await self._async.send(self._init)
        return AsyncSession(self._async)

    async def __aexit__(self, *error: object) -> None:
        await self._async.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except InvalidURI as error:
            raise ConnectFailed(str(error), reconnectable=False) from None
        except InvalidStatus as error:
            status = error.response.status_code
            hint = " (is the api_key right?)" if status in (401, 403) else ""
            raise ConnectFailed(
                f"{self._url} answered HTTP {status}{hint}", reconnectable=status in _RETRYABLE_STATUS
            ) from None
        except (OSError, TimeoutError, InvalidHandshake, EOFError) as error:
            raise ConnectFailed(f"{self._url} does not answer: {error}", reconnectable=True) from None


def _close_of(end: ConnectionClosed) -> tuple[int | None, str]:
    return (end.rcvd.code, end.rcvd.reason) if end.rcvd is not None else (None, "")
