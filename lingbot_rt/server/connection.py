"""One WebSocket from accept to close.

    run
    ├── pump      the outbox -> the socket
    └── talk
        ├── read      the socket -> init, events, errors back
        ├── serve     init -> slot -> engine -> ChunkStream
        ├── places    place in line (extension ``queue``)
        └── stopped   the server shuts down

Whatever ends a connection ends ``talk``: its tasks are cancelled, the engine's session is closed, the slot is free.
Then the outbox says what is left to say and the socket is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from fastapi import WebSocket, WebSocketDisconnect

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import (
    CapacityError,
    ClientTooSlow,
    EngineFailed,
    InvalidEvent,
    InvalidInit,
    LingbotError,
    NotReady,
    RequestError,
    SessionBusy,
    ShuttingDown,
)
from lingbot_rt.recording.session_record import SessionRecorder, start_record
from lingbot_rt.server.admission import Admission
from lingbot_rt.server.chunk_stream import ChunkStream
from lingbot_rt.server.first_frame import load_first_frame
from lingbot_rt.session.messages import (
    EXTENSIONS,
    Event,
    Init,
    control_ack_message,
    decode,
    error_message,
    heartbeat_message,
    queue_message,
    session_message,
)
from lingbot_rt.session.plan import EnginePort, SessionPlan
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.telemetry import Metrics
from lingbot_rt.transport.outbox import Outbox, Parcel

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
SHUTDOWN_FAREWELL_S = 1.5
"""How long a session may take to send its last words when the server shuts down."""

_OUTBOX_PARCELS = 64
_OUTBOX_BYTES = 32 * 2**20


class _End(Exception):
    """Ends the connection in an orderly way: ``error`` is sent, then the close code."""

    def __init__(self, code: int, reason: str = "", error: LingbotError | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.error = error


@dataclass(eq=False)
class Service:
    """What all connections share."""

    config: ServeConfig
    engine: EnginePort
    admission: Admission
    metrics: Metrics
    encoders: Executor
    connections: set[Connection] = field(default_factory=set)
    failure: LingbotError | None = None  # why there is no engine

    async def tell_all_and_close(self, limit_s: float) -> None:
        """Every session gets its error and its close; returns when they are gone, after ``limit_s`` at the latest."""
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
        self._outbox = Outbox(
            max_parcels=_OUTBOX_PARCELS, max_bytes=_OUTBOX_BYTES, send_timeout_s=service.config.send_timeout_s
        )
        self._stop = asyncio.Event()
        self._inits: asyncio.Queue[tuple[Session, Init]] = asyncio.Queue(1)
        self._places: asyncio.Queue[int] = asyncio.Queue(1)
        self._session: Session | None = None
        self._stream: ChunkStream | None = None
        self._accepted_at = time.monotonic()

    def stop(self) -> None:
        """The server shuts down."""
        self._stop.set()

    async def run(self) -> None:
        """Returns when the connection is over; never raises but for cancellation."""
        metrics = self._service.metrics
        self._service.connections.add(self)
        metrics.connections.inc()
        code = 1006
        try:
            code = await self._converse()
        except* (WebSocketDisconnect, ClientTooSlow) as group:
            log.info("the client is gone: %s", "; ".join(repr(error) for error in _leaves(group)))
        except* TimeoutError:
            log.info("the client did not read its last message in time")
        finally:
            metrics.ends.labels(str(code)).inc()
            metrics.connections.dec()
            self._service.connections.discard(self)
            self.gone.set()

    async def _converse(self) -> int:
        async with asyncio.timeout(None) as limit:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._outbox.pump(self._send), name="pump")
                end = await self._talk()
                stopped = self._stop.is_set()
                limit_s = SHUTDOWN_FAREWELL_S if stopped else self._service.config.send_timeout_s
                limit.reschedule(asyncio.get_running_loop().time() + limit_s)
                if end.error is not None:
                    await self._say(end.error, last=stopped)
                await self._outbox.close()
            with _closed_is_gone():
                await self._socket.close(end.code, end.reason)
        return end.code

    async def _send(self, data: bytes) -> None:
        with _closed_is_gone():
            await self._socket.send_bytes(data)

    async def _talk(self) -> _End:
        """Until something ends the connection. Raises WebSocketDisconnect when nobody is there to hear more."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(), name="read")
                tasks.create_task(self._serve(), name="serve")
                tasks.create_task(self._tell_places(), name="places")
                tasks.create_task(self._end_when_stopped(), name="stopped")
        except ExceptionGroup as group:
            return _end_of(_leaves(group))
        raise AssertionError("the tasks of a connection only end with an exception")

    async def _end_when_stopped(self) -> None:
        await self._stop.wait()
        if self._service.failure is not None:
            raise self._service.failure
        # Told now: interrupting the chunk in work may take a while.
        await self._say(ShuttingDown("the server is shutting down"), last=True)
        raise _End(1001, "server shutdown")

    # --- read ---

    async def _read(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
            try:
                await self._take(message.get("bytes"))
            except LingbotError as error:
                await self._say(error)

    async def _take(self, data: bytes | None) -> None:
        refusal = InvalidInit if self._session is None else InvalidEvent
        if data is None:
            raise refusal("text is not read here, send binary MessagePack")
        match decode(data, refusal):
            case Init() as init:
                self._take_init(init)
            case Event() as event:
                await self._take_event(event)

    def _take_init(self, init: Init) -> None:
        if self._session is not None:
            raise InvalidInit("a session is already running on this connection, open another one")
        status = self._service.engine.status
        if not status.ready:
            raise NotReady(f"the server is not ready: {status}; try again")
        settings = resolve(init, self._service.engine.model_info, self._service.config)
        self._session = Session(uuid.uuid4().hex, settings)
        self._inits.put_nowait((self._session, init))

    async def _take_event(self, event: Event) -> None:
        session = self._session
        if session is None:
            raise InvalidEvent("there is no session yet, send an init first")
        session.receive(event, time.monotonic())
        if self._stream is not None:
            self._stream.stir()
        if "control_ack" in session.settings.extensions:
            await self._outbox.put(Parcel((control_ack_message(event.event_id, "received", None),)))

    async def _say(self, error: LingbotError, *, last: bool = False) -> None:
        """``last``: it passes what waits, and nothing follows it."""
        self._service.metrics.errors.labels(error.code).inc()
        tell = self._outbox.last_words if last else self._outbox.put
        await tell(Parcel((error_message(error),)))

    # --- serve ---

    async def _serve(self) -> None:
        config = self._service.config
        deadline = asyncio.get_running_loop().time() + config.init_timeout_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    session, init = await self._inits.get()
            except TimeoutError:
                late = InvalidInit(f"no valid init came within {config.init_timeout_s:g} s (--init-timeout-s)")
                raise _End(1008, "no init", late) from None
            try:
                await self._serve_session(session, init)
            except (RequestError, CapacityError) as error:
                self._session = None
                await self._say(error)

    async def _serve_session(self, session: Session, init: Init) -> None:
        """Raises RequestError or CapacityError when it cannot be opened, _End when it is over."""
        service, settings = self._service, session.settings
        picture = await load_first_frame(
            init.first_frame,
            settings.size,
            folder=service.config.first_frame_dir,
            allow_remote=service.config.allow_remote_first_frame,
        )
        async with service.admission.slot(self._moved) as slot:
            plan = settings.session_plan(session.id, picture)
            async with AsyncExitStack() as at_last:
                service.metrics.active.inc()
                try:
                    await service.engine.open(plan)
                    recorder = await at_last.enter_async_context(self._recorded(init, plan))
                    service.metrics.sessions.inc()
                    log.info("session %s: %s, %d latent frames", session.id, settings.size, settings.latent_frames)
                    await self._stream_session(session, recorder)
                finally:
                    # First of all: from here on nobody in line is refused, however long the rest takes.
                    slot.leaving()
                    service.metrics.active.dec()
                    await service.engine.close(session.id)
        raise _End(1000, "generation complete")

    @asynccontextmanager
    async def _recorded(self, init: Init, plan: SessionPlan) -> AsyncIterator[SessionRecorder | None]:
        """The session's recorder, closed with the reason of its end; None when it is not to be recorded."""
        config = self._service.config
        recorder = None
        if config.record_dir is not None and (config.record_sessions == "all" or init.record):
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
        except ExceptionGroup as group:
            reason = "; ".join(str(error) for error in _leaves(group))
            raise
        finally:
            await asyncio.to_thread(recorder.close, reason)

    async def _stream_session(self, session: Session, recorder: SessionRecorder | None) -> None:
        extensions = session.settings.extensions
        if "session" in extensions:
            capabilities = {"extensions": [name for name in EXTENSIONS if name in extensions]}
            await self._outbox.put(Parcel((session_message(session.id, capabilities),)))
        self._stream = ChunkStream(
            session,
            self._service.engine,
            self._outbox,
            encoders=self._service.encoders,
            metrics=self._service.metrics,
            recorder=recorder,
        )
        async with asyncio.TaskGroup() as tasks:
            heart = tasks.create_task(self._beat(session)) if "heartbeat" in extensions else None
            await self._stream.run()
            if heart is not None:
                heart.cancel()

    async def _beat(self, session: Session) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            uptime_ms = 1000 * (time.monotonic() - self._accepted_at)
            state = "paused" if session.is_paused else "running"
            await self._outbox.put(Parcel((heartbeat_message(uptime_ms, state, session.next_chunk),)))

    # --- the line ---

    def _moved(self, position: int) -> None:
        if self._places.full():
            self._places.get_nowait()  # only the newest place matters
        self._places.put_nowait(position)

    async def _tell_places(self) -> None:
        while True:
            position = await self._places.get()
            if self._session is not None and "queue" in self._session.settings.extensions:
                await self._outbox.put(Parcel((queue_message(position),)))


@contextmanager
def _closed_is_gone() -> Iterator[None]:
    """The server's keepalive may have closed the socket behind our back: then the client is gone like any other."""
    try:
        yield
    except RuntimeError as error:
        raise WebSocketDisconnect(1006, str(error)) from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single exceptions of nested groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def _end_of(errors: list[BaseException]) -> _End:
    """What the client is told. Raises the first WebSocketDisconnect or ClientTooSlow: then there is nobody to tell."""
    for error in errors:
        if isinstance(error, WebSocketDisconnect | ClientTooSlow):
            raise error
    for error in errors:
        if isinstance(error, _End):
            return error
    for error in errors:
        if isinstance(error, SessionBusy):
            return _End(1008, "busy", error)
        if isinstance(error, LingbotError):
            log.error("session failed: %s", error)
            return _End(1011, "engine error", error)
    log.error("the connection broke", exc_info=errors[0])
    first_line = str(errors[0]).strip().split("\n")[0]
    return _End(1011, "internal error", EngineFailed(f"{type(errors[0]).__name__}: {first_line}"))
