"""One WebSocket from accept to close: a task that reads and a task that serves.

    run
    ├── _read           the socket -> init and events; acknowledgements, refusals and heartbeats back
    └── Serving.run     an init -> first frame -> slot -> engine -> ``Stream``

The first of the two that returns, or ``stop``, says how the connection ends. Then both are cancelled, which parks or
closes the session and frees the slot, the client is told, and the socket is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from lingbot_rt.errors import ClientTooSlow, LingbotError, MessageTooLarge, NotReady, RequestError, ResumedElsewhere
from lingbot_rt.server.closes import LOST, Close, closed_by, closed_by_client, shut_down
from lingbot_rt.server.service import Service
from lingbot_rt.server.serving import CLOSE_CODE_S, Serving
from lingbot_rt.server.websocket import NOT_UTF8, TOO_LARGE
from lingbot_rt.session.messages import Event, Init, Resume, decode
from lingbot_rt.session.server_messages import error_message
from lingbot_rt.telemetry.logs import LoggedSession
from lingbot_rt.transport.outbox import Outbox

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often a live session is asked what is due because of the time."""

SHUTDOWN_FAREWELL_S = 1.5
"""How long a client may take to read its last error when the server shuts down."""

FINISH_S = 1.0
"""How long a session that is kept on disk may take to send its newest frames when the server shuts down."""


class Connection:
    """Serves one accepted WebSocket."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.gone = asyncio.Event()
        self._socket = socket
        self._service = service
        self._outbox = Outbox(self._write)
        self._stopped: asyncio.Future[Close] = asyncio.get_running_loop().create_future()
        self._serving = Serving(service, self._outbox, self._refusal, self._leave, time.monotonic())
        self._logged = LoggedSession()

    def stop(self) -> None:
        """The server shuts down, or its engine is lost."""
        failure = self._service.failure
        if failure is not None:
            self._stop_with(Close(1011, "engine error", failure))
        elif not self._service.parking.writes:
            self._stop_with(shut_down(parks=False))
        else:
            wait_s = FINISH_S if self._serving.finish() else 0
            asyncio.get_running_loop().call_later(wait_s, self._stop_with, shut_down(parks=True))

    def _leave(self) -> None:
        self._stop_with(Close(1008, "resumed elsewhere", ResumedElsewhere(), parks=True))

    def _stop_with(self, close: Close) -> None:
        if not self._stopped.done():
            self._stopped.set_result(close)

    @property
    def state(self) -> str | None:
        """One of ``metrics.SESSION_STATES``; None without a session."""
        return self._serving.state

    @property
    def outbox_bytes(self) -> int:
        """Bytes of messages that the socket has not taken yet."""
        return self._outbox.pending_bytes

    async def run(self) -> None:
        """Returns when the connection is over; raises nothing but cancellation."""
        metrics, close = self._service.metrics, LOST
        self._logged.enter()
        self._service.connections.add(self)
        metrics.connections.inc()
        try:
            close = await self._converse()
        finally:
            metrics.ends.labels(str(close.code)).inc()
            self._serving.ended(close.ending)
            metrics.connections.dec()
            # In this order: who sees no session any more must not see this one end later.
            self._service.sessions_over += self.state is not None
            self._service.connections.discard(self)
            self.gone.set()

    async def _converse(self) -> Close:
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(closed_by(self._read()), name="read")
            serving = tasks.create_task(closed_by(self._serving.run()), name="serve")
            endings = (reading, serving, self._stopped)
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            close = next(ending for ending in endings if ending.done()).result()
            self._serving.close = close
            reading.cancel()
            serving.cancel()
            # Told now: interrupting the chunk in work may take a while.
            await self._close_with(close)
        return close

    async def _close_with(self, close: Close) -> None:
        if not close.is_told:
            return
        limit_s = SHUTDOWN_FAREWELL_S if self._stopped.done() else self._service.config.send_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                if close.error is not None:
                    await self._outbox.send(self._refusal(close.error))
                with _closed_is_gone():
                    await self._socket.close(close.code, close.reason)
        except (TimeoutError, WebSocketDisconnect, ClientTooSlow) as error:
            log.info("the client did not read its last message: %r", error)

    async def _write(self, data: bytes, *, more: bool) -> None:
        with _closed_is_gone():
            await self._socket.send({"type": "websocket.send", "bytes": data, "more": more})

    def _refusal(self, error: LingbotError) -> bytes:
        self._service.metrics.errors.labels(error.code).inc()
        return error_message(error)

    async def _read(self) -> Close:
        """What a client sends is answered before more is read: a flood of events cannot grow a queue."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                code = message.get("code", 1005)
                log.info("the client is gone: close code %s", code)
                return closed_by_client(code)
            if message.get(NOT_UTF8):
                return Close(1007, "not UTF-8", self._unread("a text message that is not UTF-8"))
            replies: tuple[bytes, ...] = ()
            if message["type"] == "websocket.receive":
                try:
                    replies = await self._take(message)
                except (RequestError, NotReady) as error:
                    replies = (self._refusal(error),)
            replies += self._serving.tick()
            try:
                for reply in replies:
                    await self._outbox.send(reply)
            except WebSocketDisconnect:
                return await self._how_it_was_closed()
            await asyncio.sleep(0)  # a burst of small messages shares the loop, too

    async def _how_it_was_closed(self) -> Close:
        """Of a socket that cannot be written to: what the client sent before does not count any more."""
        try:
            async with asyncio.timeout(CLOSE_CODE_S):
                while True:
                    message = await self._socket.receive()
                    if message["type"] == "websocket.disconnect":
                        return closed_by_client(message.get("code", 1005))
        except TimeoutError:
            return LOST

    async def _receive(self) -> dict[str, Any]:
        """The next ASGI message; once there is a session, ``{"type": "tick"}`` when none came for a while."""
        try:
            async with asyncio.timeout(None if self._serving.session is None else TICK_S):
                return dict(await self._socket.receive())
        except TimeoutError:
            return {"type": "tick"}

    async def _take(self, message: dict[str, Any]) -> tuple[bytes, ...]:
        """Applies one client message; the replies."""
        if message.get(TOO_LARGE):
            limit_mb = self._service.config.max_message_mb
            raise MessageTooLarge(f"the message is larger than {limit_mb} MiB (--max-message-mb)")
        data = message.get("bytes")
        if data is None:
            raise self._unread("a text message")
        match await self._service.aside(len(data), decode, data, self._serving.refusal):
            case Init() as init:
                await self._serving.take_init(init, len(data))
            case Resume() as resume:
                await self._serving.take_resume(resume, len(data))
            case Event() as event:
                return self._serving.take_event(event)
        if self._serving.session is not None:
            self._logged.session_id = self._serving.session.id
        return ()

    def _unread(self, what: str) -> RequestError:
        return self._serving.refusal(f"{what} is not read here, send binary MessagePack")


@contextmanager
def _closed_is_gone() -> Iterator[None]:
    """The server's keepalive may have closed the socket behind our back: then the client is gone like any other."""
    try:
        yield
    except RuntimeError as error:
        raise WebSocketDisconnect(1006, str(error)) from None
