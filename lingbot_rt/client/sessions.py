"""The blocking and the async session on a socket. Both come back by themselves after a lost line."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from websockets.exceptions import ConnectionClosed

from lingbot_rt.client.frames import Frame
from lingbot_rt.client.kept import Retry, SavedWorld, write_world
from lingbot_rt.client.protocol import BaseSession, ClientProtocol, SessionEnded
from lingbot_rt.errors import (
    ClientError,
    ConnectFailed,
    InitRefused,
    SaveFailed,
    ServerBusy,
    ServerNotReady,
    SessionLost,
)

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection as AsyncConnection
    from websockets.sync.client import ClientConnection as BlockingConnection

SAVE_LIMIT_S = 60.0


class Dialer(Protocol):
    """Opens a line to the session's server and sends the message that begins. Raises ConnectFailed."""

    def dial(self, message: bytes) -> BlockingConnection: ...

    async def dial_async(self, message: bytes) -> AsyncConnection: ...


class Session(BaseSession[int], Iterator[Frame]):
    """A blocking session: iterate over its frames, press keys from this thread or another."""

    def __init__(self, dialer: Dialer, socket: BlockingConnection) -> None:
        super().__init__()
        self._dialer = dialer
        self._socket = socket
        self._sending = threading.Lock()  # the socket, and which events were sent on it
        self._reading = threading.Condition()
        self._is_reading = False  # one thread at a time, which reads for all
        self._coming: BlockingConnection | None = None  # a new line, before the session goes on there
        self._left = threading.Event()

    def __next__(self) -> Frame:
        """The next frame; iteration ends with the session. Raises ClientError. The session survives EventRefused."""
        try:
            self._read_until(lambda: bool(self._decoded))
        except SessionEnded:
            raise StopIteration from None
        return self._decoded.popleft()

    def save(self, path: str | Path, *, limit_s: float = SAVE_LIMIT_S) -> int:
        """Writes the world to a file, as it is at the next end of a chunk. Returns the chunk that comes next in it.

        Frames that come meanwhile are kept for the iteration. Raises EventRefused, SaveFailed if the server does not
        answer within ``limit_s``, and OutputFailed.
        """
        event_id = self._event_id + 1
        has_come = self._protocol.expect_world(event_id)
        self._event("save", None)
        try:
            self._read_until(has_come, time.monotonic() + limit_s)
        except SessionEnded:
            raise SaveFailed("save: the session ended first") from None
        return _write(path, self._protocol.take_world(event_id))

    def _read_until(self, is_done: Callable[[], bool], deadline: float | None = None) -> None:
        """Reads until ``is_done()`` or the deadline of time.monotonic(), while no other thread does it."""
        with self._reading:
            while not is_done():
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return
                if self._is_reading:
                    self._reading.wait(left_s)
                    continue
                self._is_reading = True
                self._reading.release()
                try:
                    self._read(left_s)
                finally:
                    self._reading.acquire()
                    self._is_reading = False
                    self._reading.notify_all()

    def _read(self, limit_s: float | None) -> None:
        """One message, or none within ``limit_s``."""
        try:
            with suppress(TimeoutError):
                self._decoded.extend(self._protocol.receive(self._socket.recv(limit_s)))
        except ConnectionClosed as end:
            code, reason = _close_of(end)
            if self._left.is_set():
                raise SessionEnded from None
            self._protocol.require_resumable(code, reason)
            self._come_back(code, reason)

    def _come_back(self, code: int | None, reason: str) -> None:
        """Opens a new line and goes on. Raises SessionLost if that is not possible within the server's time."""
        retry = Retry(self._protocol.resume_s, time.monotonic())
        while (delay_s := retry.delay_s(time.monotonic())) is not None and not self._left.wait(delay_s):
            try:
                socket = self._dialer.dial(self._protocol.resume_message())
            except ConnectFailed:
                continue
            is_back = False
            try:
                with self._sending:
                    self._coming = socket
                while not self._protocol.has_opened and not self._left.is_set():
                    self._decoded.extend(self._protocol.receive(socket.recv()))
                with self._sending:
                    if self._left.is_set():
                        break
                    self._socket, is_back = socket, True
                    for event in self._protocol.events.take_all():
                        socket.send(event)
                return
            except (ConnectionClosed, ClientError) as error:
                if self._left.is_set():
                    break
                _require_another_try(self._protocol, error, retry, code)
            finally:
                self._coming = None
                if not is_back:
                    socket.close()
        self._protocol.token = None
        self._protocol.closed(code, reason)

    def _send(self, message: bytes, event_id: int) -> int:
        with self._sending:
            socket, is_wanted = self._socket, self._protocol.events.take(event_id)
        try:
            if is_wanted:
                socket.send(message)
        except ConnectionClosed as end:
            code, reason = _close_of(end)
            if not self._protocol.can_resume(code):  # else it is sent when the line is back
                self._protocol.closed(code, reason)
        return event_id

    def close(self) -> None:
        """Ends the session, also while it tries to come back. ``with connect(...)`` does it."""
        self._left.set()
        with self._sending:
            lines = (self._socket, self._coming)
        for socket in lines:
            if socket is not None:
                socket.close()


class AsyncSession(BaseSession[Coroutine[Any, Any, int]], AsyncIterator[Frame]):
    """The async session: ``async for frame in session``, ``await session.press("w")``."""

    def __init__(self, dialer: Dialer, socket: AsyncConnection) -> None:
        super().__init__()
        self._dialer = dialer
        self._socket = socket
        self._reading = asyncio.Lock()  # one task at a time, which reads for all
        self._coming: AsyncConnection | None = None  # a new line, before the session goes on there
        self._has_left = False

    async def __anext__(self) -> Frame:
        """The next frame; iteration ends with the session. Raises ClientError. The session survives EventRefused."""
        try:
            await self._read_until(lambda: bool(self._decoded))
        except SessionEnded:
            raise StopAsyncIteration from None
        return self._decoded.popleft()

    async def messages(self) -> AsyncIterator[bytes | str]:
        """In place of frames: every message as it came, not decoded, until the session ends. Raises SessionLost.

        A session that is read so does not come back after a lost line.
        """
        try:
            while True:
                yield await self._socket.recv()
        except ConnectionClosed as end:
            self._protocol.closed(*_close_of(end))

    async def save(self, path: str | Path, *, limit_s: float = SAVE_LIMIT_S) -> int:
        """As ``Session.save``."""
        event_id = self._event_id + 1
        has_come = self._protocol.expect_world(event_id)
        await self._event("save", None)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._read_until(has_come)
        except SessionEnded:
            raise SaveFailed("save: the session ended first") from None
        world = self._protocol.take_world(event_id)
        return await asyncio.to_thread(_write, path, world)

    async def _read_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            async with self._reading:
                if not is_done():
                    await self._read()

    async def _read(self) -> None:
        try:
            self._decoded.extend(self._protocol.receive(await self._socket.recv()))
        except ConnectionClosed as end:
            code, reason = _close_of(end)
            self._protocol.require_resumable(code, reason)
            await self._come_back(code, reason)

    async def _come_back(self, code: int | None, reason: str) -> None:
        """As ``Session._come_back``. A cancelled one may be called again."""
        retry = Retry(self._protocol.resume_s, time.monotonic())
        while (delay_s := retry.delay_s(time.monotonic())) is not None:
            await asyncio.sleep(delay_s)
            if self._has_left:
                break
            try:
                socket = self._coming = await self._dialer.dial_async(self._protocol.resume_message())
            except ConnectFailed:
                continue
            is_back = False
            try:
                while not self._protocol.has_opened and not self._has_left:
                    self._decoded.extend(self._protocol.receive(await socket.recv()))
                if self._has_left:
                    break
                self._socket, is_back = socket, True
                for event in self._protocol.events.take_all():
                    await socket.send(event)
                return
            except (ConnectionClosed, ClientError) as error:
                if self._has_left:
                    break
                _require_another_try(self._protocol, error, retry, code)
            finally:
                self._coming = None
                if not is_back:
                    await socket.close()
        self._protocol.token = None
        self._protocol.closed(code, reason)

    async def _send(self, message: bytes, event_id: int) -> int:
        try:
            if self._protocol.events.take(event_id):
                await self._socket.send(message)
        except ConnectionClosed as end:
            code, reason = _close_of(end)
            if not self._protocol.can_resume(code):  # else it is sent when the line is back
                self._protocol.closed(code, reason)
        return event_id

    async def close(self) -> None:
        """Ends the session, also while it tries to come back. ``async with connect(...)`` does it."""
        self._has_left, self._protocol.token = True, None
        for socket in (self._socket, self._coming):
            if socket is not None:
                await socket.close()


def _write(path: str | Path, world: SavedWorld) -> int:
    write_world(path, world.data)
    return world.chunk_index


def _require_another_try(
    protocol: ClientProtocol, error: ConnectionClosed | ClientError, retry: Retry, code: int | None
) -> None:
    """After a try that ended with ``error``. Raises what ends the session; ``code`` closed its line."""
    match error:
        case ConnectionClosed():
            protocol.require_resumable(*_close_of(error))
        case ServerNotReady():
            retry.server_loads(time.monotonic())
        case ServerBusy():
            pass
        case InitRefused():
            protocol.token = None
            raise SessionLost(f"session lost: {error}", close_code=code) from None
        case _:
            protocol.token = None
            raise error from None


def _close_of(end: ConnectionClosed) -> tuple[int | None, str]:
    return (end.rcvd.code, end.rcvd.reason) if end.rcvd is not None else (None, "")
