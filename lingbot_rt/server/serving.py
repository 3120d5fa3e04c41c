"""The serving half of a connection: an init, or one that resumes -> first frame -> slot -> engine -> ``Stream``.

A session whose line is lost is handed to ``Parking`` as it stands; any other end closes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
from fastapi import WebSocketDisconnect

from lingbot_rt.errors import (
    CapacityError,
    ClientTooSlow,
    InvalidEvent,
    InvalidInit,
    LingbotError,
    NotReady,
    RequestError,
)
from lingbot_rt.recording.session_record import start_record
from lingbot_rt.server.admission import Slot
from lingbot_rt.server.closes import COMPLETE, LOST, TOO_SLOW, Close, shut_down
from lingbot_rt.server.first_frame import load_first_frame
from lingbot_rt.server.live_session import LiveSession, Pixels, Received, SavedSession
from lingbot_rt.server.parking import KeptSession
from lingbot_rt.server.service import Service
from lingbot_rt.server.stream import Link, Stream, to_the_end
from lingbot_rt.session.messages import EXTENSIONS, Event, Init, Resume
from lingbot_rt.session.plan import Rewound, SessionPlan
from lingbot_rt.session.server_messages import ResumeOffer, queue_message, session_message, warming_message
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import SessionSettings, rejoined, resolve
from lingbot_rt.session.world_file import read_world
from lingbot_rt.telemetry.session import SessionTelemetry
from lingbot_rt.transport.outbox import Outbox

log = logging.getLogger(__name__)

CLOSE_CODE_S = 1.0
"""How long a socket that cannot be written to may take to say how it was closed."""


@dataclass(eq=False)
class Start:
    """What is to be served: a session that is new, or that goes on."""

    session: Session
    settings: SessionSettings  # from its first chunk on
    init: Init  # without its first frame
    first_frame: bytes | str | Pixels | None = None  # None: the session is open
    world: bytes | None = None  # the snapshot that it goes on from
    kept: KeptSession | None = None  # of one that goes on with its token
    offer: ResumeOffer | None = None
    received: Received | None = None
    goes_on: bool = False


class Serving:
    """The sessions of one connection, one after the other until one has opened."""

    def __init__(
        self,
        service: Service,
        outbox: Outbox,
        refuse: Callable[[LingbotError], bytes],
        leave: Callable[[], None],
        accepted_at: float,
    ) -> None:
        """``leave``: tells the connection that another one came with the session's token."""
        self._service = service
        self._outbox = outbox
        self._refuse = refuse
        self._leave = leave
        self._accepted_at = accepted_at
        self._starts: asyncio.Queue[Start] = asyncio.Queue(1)
        self._stream: Stream | None = None
        self._telemetry: SessionTelemetry | None = None  # of the session that is served
        self._has_slot = False
        self._finishes = False
        self.session: Session | None = None
        self.close: Close | None = None  # how the connection ends, once that is known

    @property
    def state(self) -> str | None:
        """One of ``metrics.SESSION_STATES``; None without a session."""
        if self.session is None:
            return None
        if self._stream is None:
            return "opening" if self._has_slot else "waiting"
        return "paused" if self.session.is_paused else "playing"

    @property
    def refusal(self) -> type[RequestError]:
        """The error for a message that cannot be read."""
        return InvalidInit if self.session is None else InvalidEvent

    def ended(self, ending: str) -> None:
        """The connection is over, or its init was refused. A session that is parked is not."""
        if not self._starts.empty() and (kept := self._starts.get_nowait().kept) is not None:
            self._service.parking.release(kept)  # it came too late to be served
        if self._telemetry is not None:
            self._telemetry.ended(ending, time.monotonic())
            self._telemetry = None

    # --- what the client sends ---

    async def take_init(self, init: Init, size: int) -> None:
        """``size``: bytes of the message. Raises RequestError and NotReady."""
        self._require_free()
        service = self._service
        settings = await service.aside(size, resolve, init, service.engine.model_info, service.config)
        session = Session(
            uuid.uuid4().hex, settings, opened_at=self._accepted_at, keep_events=service.config.records(init.record)
        )
        self._begin(Start(session, settings, msgspec.structs.replace(init, first_frame=b""), init.first_frame))

    async def take_resume(self, resume: Resume, size: int) -> None:
        """As ``take_init``. Waits until the session is parked."""
        self._require_free()
        if isinstance(resume.resume, bytes):
            self._begin(await self._service.aside(size, self._saved, resume.resume, resume))
            return
        kept, offer = await self._service.parking.claim(resume.resume, self._leave)
        try:
            start = await self._parked(kept, resume)
        except BaseException:
            self._service.parking.release(kept)
            raise
        start.kept, start.offer = kept, offer
        self._begin(start)

    def take_event(self, event: Event) -> tuple[bytes, ...]:
        """The acknowledgements. Raises InvalidEvent."""
        if self.session is None:
            raise InvalidEvent("there is no session yet, send an init first")
        acknowledgements = self.session.receive(event, time.monotonic())
        if self._stream is not None:
            self._stream.wake()
        return acknowledgements

    def tick(self) -> tuple[bytes, ...]:
        """What is due because of the time. Raises PauseExpired."""
        if self.session is None or (self._stream is None and not self.session.is_warming):
            return ()
        return self.session.tick(time.monotonic())

    def finish(self) -> bool:
        """Whether a session plays that ends by itself, once its newest frames have left."""
        self._finishes = True
        if self._stream is not None:
            self._stream.finish()
        return self._stream is not None

    def _require_free(self) -> None:
        if self.session is not None:
            raise InvalidInit("a session is already running on this connection, open another one")
        status = self._service.engine.status
        if not status.ready:
            raise NotReady(f"the server is not ready: {status}; try again")

    def _begin(self, start: Start) -> None:
        self.session = start.session
        self._starts.put_nowait(start)

    async def _parked(self, kept: KeptSession, resume: Resume) -> Start:
        """A session that was parked. Raises InvalidInit."""
        live = kept.live
        if live is not None:
            settings = rejoined(live.session.settings, resume, live.session.next_index)
            start = Start(live.session, settings, live.init, goes_on=True)
            if not kept.is_open:
                start.world = await self._service.parking.world_of(kept)
                start.first_frame = read_world(start.world).first_frame
        else:
            world = await self._service.parking.world_of(kept)
            start = await self._service.aside(len(world), self._saved, world, resume, True)
        if resume.received_chunk is not None:
            start.received = Received(resume.received_chunk, resume.received_frames)
        return start

    def _saved(self, world: bytes, resume: Resume, by_token: bool = False) -> Start:
        """A session that goes on from a snapshot. Raises InvalidInit."""
        service = self._service
        file = read_world(world)
        saved = SavedSession.of(file, service.engine.model_info, service.config)
        session_id, settings, control = saved.session_id, saved.settings, saved.control
        if not by_token:
            # What is about the connection that saved it is left out: this may be somebody else.
            session_id = uuid.uuid4().hex
            settings = replace(settings, max_chunks=None, extensions=frozenset())
            control = control | {"is_paused": False}
        settings = rejoined(settings, resume, file.chunk_index)
        session = Session.restored(session_id, settings, control, opened_at=self._accepted_at)
        return Start(session, settings, saved.init, saved.first_frame, world, goes_on=True)

    # --- serve ---

    async def run(self) -> Close:
        """Serves inits until one has opened a session and that session is over."""
        limit_s, loop = self._service.config.init_timeout_s, asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    start = await self._starts.get()
            except TimeoutError:
                return Close(
                    1008, "no init", InvalidInit(f"no valid init came within {limit_s:g} s (--init-timeout-s)")
                )
            began_at = loop.time()
            try:
                return await self._serve(start)
            except (RequestError, CapacityError) as error:
                deadline += loop.time() - began_at  # the line may have been long: the client has its time again
                self.ended(error.code)
                self.session = None
                await self._outbox.send(self._refuse(error))

    async def _serve(self, start: Start) -> Close:
        """Raises RequestError or CapacityError when the session cannot be opened."""
        kept = start.kept
        live = kept.live if kept is not None and kept.live is not None else self._new(start)
        self._telemetry = live.telemetry
        has_played = False
        try:
            picture = await self._picture(start, live)
            in_line = self._tell_place if "queue" in start.settings.extensions else None
            async with self._service.admission.slot(in_line) as slot:
                self._has_slot = has_played = True
                live.telemetry.has_slot(time.monotonic())
                return await self._play(start, live, picture, slot)
        finally:
            if kept is not None and not has_played:
                self._give_back(kept)

    def _give_back(self, kept: KeptSession) -> None:
        """A session that was not opened waits on for whoever has its token."""
        if kept.live is not None:
            self._telemetry = None  # it is not over
        self._service.parking.release(kept)

    def _new(self, start: Start) -> LiveSession:
        telemetry = SessionTelemetry(start.session, self._service.metrics, self._service.tracer, time.monotonic())
        return LiveSession(start.session, start.init, telemetry)

    async def _picture(self, start: Start, live: LiveSession) -> Pixels | None:
        """The first frame at the session's size; None when the session is open."""
        # It may have megabytes as it came: nobody keeps it while the client waits and plays.
        given, start.first_frame = start.first_frame, None
        if isinstance(given, bytes | str):
            given = await load_first_frame(
                given,
                start.settings.size,
                folder=self._service.config.first_frame_dir,
                allow_remote=self._service.config.allow_remote_first_frame,
            )
        now = time.monotonic()
        if start.kept is not None and start.kept.live is live:
            live.telemetry.came_back(now)
        else:
            live.telemetry.has_picture(now)
        return given

    async def _play(self, start: Start, live: LiveSession, picture: Pixels | None, slot: Slot) -> Close:
        is_open, reason = picture is None, "interrupted"
        try:
            place = await self._opened(start, live, picture)
            is_open = True
            await self._stream_session(start, live, place)
            if not live.session.is_complete:
                self.close = shut_down(parks=True)  # ``finish`` was called
                return self.close
            reason = "complete"
            return COMPLETE
        except WebSocketDisconnect:
            slot.leaving()
            await asyncio.sleep(CLOSE_CODE_S)  # the reader knows how the client left, and cancels this
            self.close = LOST
            raise
        except ClientTooSlow:
            self.close = TOO_SLOW
            raise
        except Exception as error:
            reason = str(error)
            raise
        finally:
            # First of all: from here on nobody in line is refused, however long the rest takes.
            slot.leaving()
            self._has_slot = False
            if is_open and start.kept is not None and self.close is not None and self.close.parks:
                self._telemetry = None  # it is not over
                live.telemetry.parked(time.monotonic())
                self._service.parking.park(start.kept)
            else:
                await to_the_end(self._over(start.kept, live, is_open, reason))

    async def _over(self, kept: KeptSession | None, live: LiveSession, is_open: bool, reason: str) -> None:
        await self._service.engine.close(live.id)
        if kept is not None and is_open:
            await self._service.parking.end(kept)
        elif kept is not None:
            self._give_back(kept)
        await (live.over(reason) if kept is None or is_open else live.end_record(reason))

    async def _opened(self, start: Start, live: LiveSession, picture: Pixels | None) -> Rewound:
        """Opens the session on the engine, if it is not open. Where it stands."""
        service, session, telemetry = self._service, live.session, live.telemetry
        if picture is None:
            telemetry.resumed("memory", time.monotonic())
            return Rewound(session.next_index, session.branch, exact=True)
        await service.parking.settled()
        plan = start.settings.session_plan(session.id, picture)
        place = await self._open(session, plan, start.world)
        start.world = None  # it may be large: nobody keeps it while the client plays
        if start.kept is None or start.kept.live is None:
            telemetry.opened(time.monotonic())
        if place is None:
            if service.config.records(live.init.record):
                await to_the_end(self._start_record(live, plan))  # else nobody would close it
            return Rewound(0, 0, exact=True)
        session.forget_boundaries()  # the engine's history begins with the snapshot
        telemetry.resumed("file" if start.kept is None else "snapshot", time.monotonic())
        if start.kept is not None:
            service.parking.opened(start.kept, live)
        return place

    async def _start_record(self, live: LiveSession, plan: SessionPlan) -> None:
        config, info = self._service.config, self._service.engine.model_info
        live.recorder = await asyncio.to_thread(start_record, config, live.init, plan, info)

    async def _open(self, session: Session, plan: SessionPlan, world: bytes | None) -> Rewound | None:
        """A client that asked for it hears when the opening begins with a warm-up."""
        engine = self._service.engine
        warm_up = engine.warm_up_of(plan)
        session.is_warming = warm_up is not None
        if warm_up is not None and "warming" in session.settings.extensions:
            expected_ms = None if warm_up.expected_s is None else 1000 * warm_up.expected_s
            await self._outbox.send(warming_message(session.id, str(warm_up.size), expected_ms))
        try:
            return await engine.open(plan, world)
        finally:
            session.is_warming = False

    async def _stream_session(self, start: Start, live: LiveSession, place: Rewound) -> None:
        service, session = self._service, live.session
        if start.goes_on:
            session.rejoin(start.settings, place, time.monotonic())
        extensions = session.settings.extensions
        if start.kept is None and "session" in extensions:
            start.kept, start.offer = service.parking.offer(live, self._leave) or (None, None)
        live.is_kept = start.kept is not None
        if "session" in extensions or start.goes_on:
            capabilities = {"extensions": [name for name in EXTENSIONS if name in extensions]}
            again = [new.chunk.plan.chunk_index for new, frames in live.to_resend(start.received) if frames]
            place = replace(place, chunk_index=min([place.chunk_index, *again]))
            resumed = place if start.goes_on else None
            await self._outbox.send(session_message(session.id, capabilities, start.offer, resumed))

        async def at_boundary() -> None:
            if start.kept is not None:
                await service.parking.boundary(start.kept)

        link = Link(self._outbox, service.encoders, self._refuse, at_boundary)
        self._stream = Stream(live, service.engine, service.turns, link)
        if self._finishes:
            self._stream.finish()
        await self._stream.run(start.received)

    async def _tell_place(self, position: int, waited_s: float) -> None:
        await self._outbox.send(queue_message(position, 1000 * waited_s))
