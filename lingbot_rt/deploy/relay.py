"""One client of a front: its init, its wait for a free replica, and then both directions until one side closes."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from contextlib import suppress
from typing import Any, Protocol

from fastapi import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.errors import (
    ClientTooSlow,
    EngineFailed,
    InvalidEvent,
    InvalidInit,
    MessageTooLarge,
    NotReady,
    RequestError,
    SessionBusy,
)
from lingbot_rt.server.admission import REMINDER_S
from lingbot_rt.server.closes import Close, closed_by, shut_down
from lingbot_rt.server.websocket import NOT_UTF8, TOO_LARGE
from lingbot_rt.session.messages import Event, Init, Resume, decode
from lingbot_rt.session.plan import EngineStatus
from lingbot_rt.session.server_messages import error_message, queue_message

log = logging.getLogger(__name__)

CONNECT_LIMIT_S = 10.0
"""How long a replica may take to answer the front's handshake."""

FAREWELL_LIMIT_S = 1.5
"""How long a client may take to read its last error, and a replica to answer a close."""

TELL_AFTER_S = 0.3
"""A client that waits no longer than this does not hear of the line: taking a free replica takes a moment, too."""

RECEIVE_BYTES = 64 * 2**10
"""Bytes of a replica that the kernel keeps for the front. More would be frames that count as sent and are not."""

BACKLOG_MESSAGES = 64
"""Messages that a client in line may send ahead. More are read once it has its replica."""

REPLICA_LOST = Close(1011, "engine error", EngineFailed("the replica that served this session was lost; connect again"))


class Lease(Protocol):
    """One client's place in the queue for a replica, and then its hold of one."""

    async def acquire(self) -> str:
        """``host:port`` of a replica that is held from now on. Raises EngineFailed when it was lost on the way."""

    async def release(self) -> None:
        """Gives the place or the replica back. Idempotent; raises nothing."""


class Pool(Protocol):
    """The replicas. ``deploy/ray.py`` has the real one; tests bring one without Ray."""

    @property
    def status(self) -> EngineStatus:
        """Of all together: ready once one replica is."""

    async def start(self) -> None:
        """Returns when a replica is ready. Raises EngineFailed."""

    async def stop(self) -> None: ...

    def lease(self) -> Lease:
        """A place at the end of the queue, once it is acquired. Only while the status is ready."""

    async def addresses(self) -> list[str]:
        """``host:port`` of every replica that answers."""


class Line:
    """The clients that wait for a replica, in the order in which they came."""

    def __init__(self) -> None:
        self._changed: dict[Relay, asyncio.Event] = {}
        self._patient: set[Relay] = set()

    @property
    def length(self) -> int:
        """Those that wait without a limit."""
        return len(self._patient)

    def join(self, relay: Relay, *, waits: bool) -> asyncio.Event:
        """An event that is set whenever the client's place may have changed."""
        if waits:
            self._patient.add(relay)
        return self._changed.setdefault(relay, asyncio.Event())

    def leave(self, relay: Relay) -> None:
        self._patient.discard(relay)
        if self._changed.pop(relay, None) is not None:
            for changed in self._changed.values():
                changed.set()

    def place(self, relay: Relay) -> int:
        """1 is next."""
        return list(self._changed).index(relay) + 1


class Relay:
    """Serves one accepted WebSocket."""

    def __init__(self, client: WebSocket, config: ServeConfig, pool: Pool, line: Line) -> None:
        self.gone = asyncio.Event()
        self.has_replica = False
        self._client = client
        self._config = config
        self._pool = pool
        self._line = line
        self._backlog: list[dict[str, Any]] = []  # read before there was a replica
        self._stopped: asyncio.Future[Close] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """The server shuts down."""
        if not self._stopped.done():
            self._stopped.set_result(shut_down(parks=False))

    async def run(self) -> None:
        """Returns when the connection is over; raises nothing but cancellation."""
        try:
            async with asyncio.TaskGroup() as tasks:
                serving = tasks.create_task(closed_by(self._serve()), name="relay")
                await asyncio.wait((serving, self._stopped), return_when=asyncio.FIRST_COMPLETED)
                close = self._stopped.result() if self._stopped.done() else serving.result()
                serving.cancel()
                await self._close_with(close)
        finally:
            self.gone.set()

    async def _serve(self) -> Close:
        try:
            async with asyncio.timeout(self._config.init_timeout_s):
                first, init = await self._read_init()
        except TimeoutError:
            limit_s = self._config.init_timeout_s
            error = InvalidInit(f"no valid init came within {limit_s:g} s (--init-timeout-s)")
            return Close(1008, "no init", error)
        if init is None:
            return Close(1007, "not UTF-8", InvalidInit("a text message that is not UTF-8 is not read here"))
        lease = self._pool.lease()
        try:
            address = await self._turn(lease, in_line="queue" in (init.protocol_extensions or ()))
            self.has_replica = True
            return await self._converse(address, first)
        finally:
            self.has_replica = False
            await lease.release()

    # --- before there is a replica ---

    async def _read_init(self) -> tuple[bytes, Init | Resume | None]:
        """The first valid init as it came; None for text that is none, which ends the connection."""
        while True:
            message = await self._receive()
            if message.get(NOT_UTF8):
                return b"", None
            data = message.get("bytes")
            try:
                if data is None:
                    raise InvalidInit("a text message is not read here, send binary MessagePack")
                match await asyncio.to_thread(decode, data, InvalidInit):
                    case Resume(resume=str()):
                        raise InvalidInit(
                            "sessions of a server with --ray-replicas are not kept; send a saved world, or an init "
                            "without resume",
                            field="resume",
                        )
                    case Init() | Resume() as init:
                        if not self._pool.status.ready:
                            raise NotReady(f"the server is not ready: {self._pool.status}; try again")
                        return data, init
                    case Event():
                        raise InvalidEvent("there is no session yet, send an init first")
            except (RequestError, NotReady) as error:
                await self._send(error_message(error))

    async def _turn(self, lease: Lease, *, in_line: bool) -> str:
        """The address of the client's replica, once it has one. Raises SessionBusy when it does not wait in line.

        What the client sends meanwhile is kept: a client that leaves is noticed.
        """
        is_full = in_line and self._line.length >= self._config.max_waiting
        waits = in_line and not is_full
        changed = self._line.join(self, waits=waits)
        acquiring = asyncio.create_task(lease.acquire(), name="lease")
        self._reading = asyncio.create_task(self._receive(), name="read ahead")
        try:
            await self._wait(acquiring, changed, self._config.max_waiting if is_full else None, waits=waits)
            address = acquiring.result()
            self._reading.cancel()
            await asyncio.wait({self._reading})  # a cancellation of this task comes through, that of the reader not
            if not self._reading.cancelled():
                self._backlog.append(self._reading.result())
            return address
        finally:
            self._line.leave(self)
            acquiring.cancel()
            self._reading.cancel()
            await asyncio.gather(acquiring, self._reading, return_exceptions=True)

    async def _wait(
        self, acquiring: asyncio.Task[str], changed: asyncio.Event, full_at: int | None, *, waits: bool
    ) -> None:
        """Returns when ``acquiring`` is done. Tells a client that ``waits`` its place; refuses another in time."""
        began = time.monotonic()
        told, due_at = 0, began + (TELL_AFTER_S if waits else self._config.session_wait_s)
        while not acquiring.done():
            now = time.monotonic()
            if now >= due_at and not waits:
                raise SessionBusy(full_at)
            if now >= due_at or (told and self._line.place(self) != told):
                told, due_at = self._line.place(self), now + REMINDER_S
                await self._send(queue_message(told, 1000 * (now - began)))
                continue
            changed.clear()
            moving = asyncio.create_task(changed.wait())
            has_room = len(self._backlog) < BACKLOG_MESSAGES
            awaited = (acquiring, moving, *((self._reading,) if has_room else ()))
            try:
                await asyncio.wait(awaited, timeout=due_at - now, return_when=asyncio.FIRST_COMPLETED)
            finally:
                moving.cancel()
            if has_room and self._reading.done():
                self._backlog.append(self._reading.result())
                self._reading = asyncio.create_task(self._receive(), name="read ahead")
        if told:
            await self._send(queue_message(0, 1000 * (time.monotonic() - began)))

    # --- with a replica ---

    async def _converse(self, address: str, first: bytes) -> Close:
        try:
            replica = await self._connect(address)
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
            log.error("the replica at %s cannot be reached: %r", address, error)
            return REPLICA_LOST
        upward = asyncio.create_task(self._up(replica, first), name="up")
        downward = asyncio.create_task(self._down(replica), name="down")
        try:
            await asyncio.wait((upward, downward), return_when=asyncio.FIRST_COMPLETED)
            # What a replica says before it closes is for the client to hear, even if the client's messages end first.
            close = None if downward.done() else upward.result()
            return close or await downward
        finally:
            for task in (upward, downward):
                task.cancel()
            try:
                await asyncio.gather(upward, downward, return_exceptions=True)
                await _end(replica)
            finally:
                replica.transport.abort()  # also when the front ends meanwhile: the replica is to notice at once

    async def _connect(self, address: str) -> ClientConnection:
        host, _, port = address.rpartition(":")
        family, kind, protocol, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        link = socket.socket(family, kind, protocol)
        try:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            link.setblocking(False)
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await asyncio.get_running_loop().sock_connect(link, where)
                key = self._config.api_key
                return await connect(
                    f"ws://{address}{ENDPOINT}",
                    sock=link,
                    proxy=None,
                    compression=None,
                    max_size=None,
                    max_queue=1,
                    ping_interval=None,  # a replica pings; a lost one is seen by TCP and by Ray
                    additional_headers={} if key is None else {"Authorization": f"Bearer {key}"},
                )
        except BaseException:
            link.close()
            raise

    async def _up(self, replica: ClientConnection, first: bytes) -> Close | None:
        """The client's messages -> the replica. Returns None when the replica closed.

        Raises WebSocketDisconnect when the client did.
        """
        with suppress(ConnectionClosed):
            await replica.send(first)
            while True:
                message = self._backlog.pop(0) if self._backlog else await self._receive()
                if message.get(NOT_UTF8):
                    return Close(1007, "not UTF-8", InvalidEvent("a text message that is not UTF-8 is not read here"))
                data = message.get("bytes")
                await replica.send(message.get("text") or "" if data is None else data)
        return None

    async def _down(self, replica: ClientConnection) -> Close:
        """The replica's messages -> the client, until the replica closes."""
        with suppress(ConnectionClosed):
            while True:
                data = await replica.recv(decode=False)
                await self._send(data)
        if replica.close_code in (None, 1006):
            return REPLICA_LOST
        return Close(replica.close_code, replica.close_reason or "")

    # --- the client's socket ---

    async def _receive(self) -> dict[str, Any]:
        """The next message. Raises WebSocketDisconnect and MessageTooLarge."""
        message = dict(await self._client.receive())
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        if message.get(TOO_LARGE):
            limit_mb = self._config.max_message_mb
            raise MessageTooLarge(f"the message is larger than {limit_mb} MiB (--max-message-mb)")
        return message

    async def _send(self, data: bytes) -> None:
        try:
            await self._client.send({"type": "websocket.send", "bytes": data})
        except RuntimeError as error:  # closed behind our back, by the keepalive for one
            raise WebSocketDisconnect(1006, str(error)) from None

    async def _close_with(self, close: Close) -> None:
        if not close.is_told:
            return
        with suppress(TimeoutError, WebSocketDisconnect, ClientTooSlow, RuntimeError):
            async with asyncio.timeout(FAREWELL_LIMIT_S if self._stopped.done() else self._config.send_timeout_s):
                if close.error is not None:
                    await self._send(error_message(close.error))
                await self._client.close(close.code, close.reason)


async def _end(replica: ClientConnection) -> None:
    """Closes the link to a replica. Frames on the way are read and thrown away: the replica's close is behind them."""
    closing = asyncio.create_task(replica.close())
    with suppress(TimeoutError, ConnectionClosed):
        async with asyncio.timeout(FAREWELL_LIMIT_S):
            while True:
                await replica.recv(decode=False)
    replica.transport.abort()
    await asyncio.wait((closing,))
