"""``connect``: one call, a blocking session under ``with`` and an async one under ``async with``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import connect as connect_blocking

from lingbot_rt.client.frames import Frame
from lingbot_rt.client.session import Front, init_message, websocket_url
from lingbot_rt.errors import ConnectFailed

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection as AsyncConnection
    from websockets.sync.client import ClientConnection as BlockingConnection

_MAX_MESSAGE_BYTES = 512 * 2**20  # 16 raw frames of 3840x2160 pass
_MAX_QUEUED_MESSAGES = 8  # received and not read yet; beyond that the server waits
_CLOSE_LIMIT_S = 0.5  # the server has the close by then; its own waits behind frames nobody reads any more
_HTTP_TRY_AGAIN = (429, 502, 503, 504)


class Session(Front[int], Iterator[Frame]):
    """A live session: iterate its frames, and press keys from this thread or another."""

    def __init__(self, socket: BlockingConnection) -> None:
        super().__init__()
        self._socket = socket

    def __next__(self) -> Frame:
        """The next frame; ends with the session. Raises ClientError; after EventRefused iterate on."""
        while not self._ready:
            try:
                self._ready.extend(self._core.receive(self._socket.recv()))
            except ConnectionClosed as end:
                self._core.closed(*_close_of(end))
                raise StopIteration from None
        return self._ready.popleft()

    def _send(self, message: bytes, event_id: int) -> int:
        try:
            self._socket.send(message)
        except ConnectionClosed as end:
            self._core.closed(*_close_of(end))
        return event_id


class AsyncSession(Front[Coroutine[Any, Any, int]], AsyncIterator[Frame]):
    """The same on an event loop: ``async for frame in session``, ``await session.press("w")``."""

    def __init__(self, socket: AsyncConnection) -> None:
        super().__init__()
        self._socket = socket

    async def __anext__(self) -> Frame:
        """The next frame; ends with the session. Raises ClientError; after EventRefused iterate on."""
        while not self._ready:
            try:
                self._ready.extend(self._core.receive(await self._socket.recv()))
            except ConnectionClosed as end:
                self._core.closed(*_close_of(end))
                raise StopAsyncIteration from None
        return self._ready.popleft()

    async def _send(self, message: bytes, event_id: int) -> int:
        try:
            await self._socket.send(message)
        except ConnectionClosed as end:
            self._core.closed(*_close_of(end))
        return event_id


class connect:
    """Opens a session at ``url`` (``http://host:port``, ``ws://host:port`` or the endpoint itself).

    ``init`` takes the arguments of ``session.init_message``: prompt, first_frame, script and any field of the wire.
    Entering raises ConnectFailed; what the server thinks of the init is raised by the first iteration.
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
            hint = " (api_key?)" if status in (401, 403) else ""
            raise ConnectFailed(
                f"{self._url} answered HTTP {status}{hint}", reconnectable=status in _HTTP_TRY_AGAIN
            ) from None
        except (OSError, TimeoutError, InvalidHandshake, EOFError) as error:
            raise ConnectFailed(f"{self._url} does not answer: {error}", reconnectable=True) from None


def _close_of(end: ConnectionClosed) -> tuple[int | None, str]:
    return (end.rcvd.code, end.rcvd.reason) if end.rcvd is not None else (None, "")
