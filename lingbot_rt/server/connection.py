"""One WebSocket from accept to close: a task that reads and a task that serves.

    run
    ├── _read     the socket -> init and events; acknowledgements, refusals and heartbeats back
    └── _serve    an init -> first frame -> slot -> engine -> ``Stream``

The first of the two that returns, or ``stop``, says how the connection ends. Then both are cancelled, which closes the
engine's session and frees the slot, the client is told, and the socket is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from fastapi import WebSocket, WebSocketDisconnect

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import (
    CapacityError,
    ClientTooSlow,
    EngineFailed,
    InvalidEvent,
    InvalidInit,
    LingbotError,
    MessageTooLarge,
    NotReady,
    PauseExpired,
    RequestError,
    SessionBusy,
    ShuttingDown,
)
from lingbot_rt.recording.session_record import SessionRecorder, start_record
from lingbot_rt.server.admission import Admission
from lingbot_rt.server.first_frame import load_first_frame
from lingbot_rt.server.stream import Stream
from lingbot_rt.server.websocket import NOT_UTF8, TOO_LARGE
from lingbot_rt.session.messages import EXTENSIONS, Event, Init, Resume, decode
from lingbot_rt.session.plan import EnginePort, SessionPlan
from lingbot_rt.session.server_messages import error_message, queue_message, session_message, warming_message
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.telemetry import Metrics
from lingbot_rt.telemetry.logs import LoggedSession
from lingbot_rt.telemetry.session import SessionTelemetry
from lingbot_rt.telemetry.tracing import Tracer
from lingbot_rt.transport.outbox import Outbox

log = logging.getLogger(__name__)

Result = TypeVar("Result")

INLINE_BYTES = 2048
"""A larger message is read in a thread, so that no client holds up the others."""

TICK_S = 0.25
"""How often a live session is asked what is due because of the time."""

SHUTDOWN_FAREWELL_S = 1.5
"""How long a client may take to read its last error when the server shuts down."""


@dataclass(frozen=True, slots=True)
class Close:
    """How a connection ends."""

    code: int
    reason: str = ""
    error: LingbotError | None = None  # sent before the close

    @property
    def is_told(self) -> bool:
        """False when nobody is there to be told."""
        return self.code != _ABNORMAL

    @property
    def ending(self) -> str:
        """One word for metrics and logs: the code of the error, or how the connection ended without one."""
        if self.error is not None:
            return self.error.code
        return "complete" if self is COMPLETE else self.reason.replace(" ", "_")


_ABNORMAL = 1006
COMPLETE = Close(1000, "generation complete")
GONE = Close(_ABNORMAL, "client gone")
TOO_SLOW = Close(_ABNORMAL, "client too slow")


@dataclass(eq=False)
class Service:
    """What all connections share."""

    config: ServeConfig
    engine: EnginePort
    admission: Admission
    metrics: Metrics
    encoders: Executor
    readers: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="read"))
    connections: set[Connection] = field(default_factory=set)
    tracer: Tracer | None = None
    failure: LingbotError | None = None  # why there is no engine

    def show_metrics(self) -> None:
        """Sets the metrics that say how things are now."""
        metrics, status = self.metrics, self.engine.status
        metrics.ready.set(status.ready)
        metrics.show_sessions(connection.state for connection in self.connections)
        metrics.show_memory(sum(each.outbox_bytes for each in self.connections), self.engine.memory_bytes)
        if status.ready:
            metrics.show_model(self.engine.model_info)

    async def close_all(self, limit_s: float) -> None:
        """Every client gets its error and its close. Returns when all are gone, after ``limit_s`` at the latest."""
        leaving = list(self.connections)
        for connection in leaving:
            connection.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for connection in leaving:
                    await connection.gone.wait()


class Connection:
    """Serves one accepted WebSocket."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.gone = asyncio.Event()
        self._socket = socket
        self._service = service
        self._outbox = Outbox(self._write)
        self._stopped: asyncio.Future[Close] = asyncio.get_running_loop().create_future()
        self._inits: asyncio.Queue[tuple[Session, Init]] = asyncio.Queue(1)
        self._first_frame: bytes | str = b""  # of the init that is not served yet
        self._session: Session | None = None
        self._stream: Stream | None = None
        self._telemetry: SessionTelemetry | None = None  # of the session that is served
        self._has_slot = False
        self._logged = LoggedSession()
        self._accepted_at = time.monotonic()

    def stop(self) -> None:
        """The server shuts down, or its engine is lost."""
        failure = self._service.failure
        if self._stopped.done():
            return
        if failure is not None:
            self._stopped.set_result(Close(1011, "engine error", failure))
        else:
            self._stopped.set_result(Close(1001, "server shutdown", ShuttingDown("the server is shutting down")))

    @property
    def state(self) -> str | None:
        """One of ``metrics.SESSION_STATES``; None without a session."""
        if self._session is None:
            return None
        if self._stream is None:
            return "opening" if self._has_slot else "waiting"
        return "paused" if self._session.is_paused else "playing"

    @property
    def outbox_bytes(self) -> int:
        """Bytes of messages that the socket has not taken yet."""
        return self._outbox.pending_bytes

    async def run(self) -> None:
        """Returns when the connection is over; raises nothing but cancellation."""
        metrics, close = self._service.metrics, GONE
        self._logged.enter()
        self._service.connections.add(self)
        metrics.connections.inc()
        try:
            close = await self._converse()
        finally:
            metrics.ends.labels(str(close.code)).inc()
            if self._telemetry is not None:
                self._telemetry.ended(close.ending, time.monotonic())
            metrics.connections.dec()
            self._service.connections.discard(self)
            self.gone.set()

    async def _converse(self) -> Close:
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._ended(self._read()), name="read")
            serving = tasks.create_task(self._ended(self._serve()), name="serve")
            endings = (reading, serving, self._stopped)
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            close = next(ending for ending in endings if ending.done()).result()
            reading.cancel()
            serving.cancel()
            # Told now: interrupting the chunk in work may take a while.
            await self._close_with(close)
        return close

    async def _ended(self, work: Coroutine[Any, Any, Close]) -> Close:
        """The edge of a connection: what a task raises becomes the close that tells the client about it."""
        try:
            return await work
        except (WebSocketDisconnect, ClientTooSlow) as error:
            log.info("the client is gone: %r", error)
            return TOO_SLOW if isinstance(error, ClientTooSlow) else GONE
        except SessionBusy as error:
            return Close(1008, "busy", error)
        except PauseExpired as error:
            return Close(1008, "paused too long", error)
        except MessageTooLarge as error:
            return Close(1009, "message too large", error)
        except LingbotError as error:
            log.error("session failed: %s", error)
            return Close(1011, "engine error", error)
        except Exception as error:
            log.exception("the connection broke")
            # The text of an unexpected error is for the log: it may hold paths of this machine.
            return Close(1011, "internal error", EngineFailed(f"{type(error).__name__}; the server's log has more"))

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

    # --- read ---

    async def _read(self) -> Close:
        """What a client sends is answered before more is read: a flood of events cannot grow a queue."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                log.info("the client is gone: close code %s", message.get("code", 1005))
                return GONE
            if message.get(NOT_UTF8):
                return Close(1007, "not UTF-8", self._unread("a text message that is not UTF-8"))
            replies: tuple[bytes, ...] = ()
            if message["type"] == "websocket.receive":
                try:
                    replies = await self._take(message)
                except (RequestError, NotReady) as error:
                    replies = (self._refusal(error),)
            if self._session is not None and (self._stream is not None or self._session.is_warming):
                replies += self._session.tick(time.monotonic())
            for reply in replies:
                await self._outbox.send(reply)
            await asyncio.sleep(0)  # a burst of small messages shares the loop, too

    async def _receive(self) -> dict[str, Any]:
        """The next ASGI message; once there is a session, ``{"type": "tick"}`` when none came for a while."""
        try:
            async with asyncio.timeout(None if self._session is None else TICK_S):
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
        refusal = InvalidInit if self._session is None else InvalidEvent
        match await self._aside(len(data), decode, data, refusal):
            case Init() as init:
                await self._take_init(init, len(data))
                return ()
            case Event() as event:
                return self._take_event(event)
            case Resume():
                raise InvalidInit("sessions are not kept by this server", field="resume")

    def _unread(self, what: str) -> RequestError:
        refusal = InvalidInit if self._session is None else InvalidEvent
        return refusal(f"{what} is not read here, send binary MessagePack")

    async def _aside(self, size: int, work: Callable[..., Result], *args: Any) -> Result:
        """Calls ``work``, in a thread if the message it is about is large."""
        if size <= INLINE_BYTES:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._service.readers, work, *args)

    async def _take_init(self, init: Init, size: int) -> None:
        if self._session is not None:
            raise InvalidInit("a session is already running on this connection, open another one")
        service = self._service
        if not service.engine.status.ready:
            raise NotReady(f"the server is not ready: {service.engine.status}; try again")
        settings = await self._aside(size, resolve, init, service.engine.model_info, service.config)
        self._session = Session(
            uuid.uuid4().hex, settings, opened_at=self._accepted_at, keep_events=service.config.records(init.record)
        )
        self._logged.session_id = self._session.id
        self._first_frame = init.first_frame
        self._inits.put_nowait((self._session, msgspec.structs.replace(init, first_frame=b"")))

    def _take_event(self, event: Event) -> tuple[bytes, ...]:
        if self._session is None:
            raise InvalidEvent("there is no session yet, send an init first")
        acknowledgements = self._session.receive(event, time.monotonic())
        if self._stream is not None:
            self._stream.wake()
        return acknowledgements

    # --- serve ---

    async def _serve(self) -> Close:
        limit_s, loop = self._service.config.init_timeout_s, asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    session, init = await self._inits.get()
            except TimeoutError:
                return Close(
                    1008, "no init", InvalidInit(f"no valid init came within {limit_s:g} s (--init-timeout-s)")
                )
            began_at = loop.time()
            try:
                return await self._serve_session(session, init)
            except (RequestError, CapacityError) as error:
                deadline += loop.time() - began_at  # the line may have been long: the client has its time again
                if self._telemetry is not None:
                    self._telemetry.ended(error.code, time.monotonic())
                self._session = self._telemetry = None
                await self._outbox.send(self._refusal(error))

    def _take_first_frame(self) -> bytes | str:
        """The init's picture as it came. It may have megabytes: nobody keeps it while the client waits and plays."""
        first_frame, self._first_frame = self._first_frame, b""
        return first_frame

    async def _serve_session(self, session: Session, init: Init) -> Close:
        """Raises RequestError or CapacityError when the session cannot be opened."""
        service, settings = self._service, session.settings
        telemetry = SessionTelemetry(session, service.metrics, service.tracer, time.monotonic())
        self._telemetry = telemetry
        picture = await load_first_frame(
            self._take_first_frame(),
            settings.size,
            folder=service.config.first_frame_dir,
            allow_remote=service.config.allow_remote_first_frame,
        )
        telemetry.has_picture(time.monotonic())
        in_line = self._tell_place if "queue" in settings.extensions else None
        async with service.admission.slot(in_line) as slot:
            self._has_slot = True
            telemetry.has_slot(time.monotonic())
            plan = settings.session_plan(session.id, picture)
            async with AsyncExitStack() as at_last:
                try:
                    await self._open(session, plan)
                    recorder = await at_last.enter_async_context(self._recorded(init, plan))
                    telemetry.opened(time.monotonic())
                    await self._stream_session(session, telemetry, recorder)
                finally:
                    # First of all: from here on nobody in line is refused, however long the rest takes.
                    slot.leaving()
                    self._has_slot = False
                    await _to_the_end(service.engine.close(session.id))
        return COMPLETE

    async def _open(self, session: Session, plan: SessionPlan) -> None:
        """Opens the session on the engine. A client that asked for it hears when that begins with a warm-up."""
        engine = self._service.engine
        warm_up = engine.warm_up_of(plan)
        session.is_warming = warm_up is not None
        if warm_up is not None and "warming" in session.settings.extensions:
            expected_ms = None if warm_up.expected_s is None else 1000 * warm_up.expected_s
            await self._outbox.send(warming_message(session.id, str(warm_up.size), expected_ms))
        try:
            await engine.open(plan)
        finally:
            session.is_warming = False

    async def _stream_session(
        self, session: Session, telemetry: SessionTelemetry, recorder: SessionRecorder | None
    ) -> None:
        extensions = session.settings.extensions
        if "session" in extensions:
            capabilities = {"extensions": [name for name in EXTENSIONS if name in extensions]}
            await self._outbox.send(session_message(session.id, capabilities))
        self._stream = Stream(
            session,
            self._service.engine,
            self._outbox,
            encoders=self._service.encoders,
            telemetry=telemetry,
            recorder=recorder,
        )
        await self._stream.run()

    @asynccontextmanager
    async def _recorded(self, init: Init, plan: SessionPlan) -> AsyncIterator[SessionRecorder | None]:
        """The session's recorder, closed with the reason of its end; None when the session is not recorded."""
        config = self._service.config
        recorder = None
        if config.records(init.record):
            recorder = await asyncio.to_thread(start_record, config, init, plan, self._service.engine.model_info)
        if recorder is None:
            yield None
            return
        reason = "complete"
        try:
            yield recorder
        except asyncio.CancelledError:
            reason = "interrupted"
            raise
        except Exception as error:
            reason = str(error)
            raise
        finally:
            await asyncio.to_thread(recorder.close, reason)

    async def _tell_place(self, position: int, waited_s: float) -> None:
        await self._outbox.send(queue_message(position, 1000 * waited_s))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Waits for ``work`` even if it is cancelled meanwhile: a session that is closing must not stay open."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


@contextmanager
def _closed_is_gone() -> Iterator[None]:
    """The server's keepalive may have closed the socket behind our back: then the client is gone like any other."""
    try:
        yield
    except RuntimeError as error:
        raise WebSocketDisconnect(1006, str(error)) from None
