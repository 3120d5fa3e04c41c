"""Sessions whose clients may come back: parked in memory, as snapshots, or on disk.

A session with a token is *held* by the connection that plays it, or that waits in line with it. Without one it is
parked, and ends after --resume-s. Whoever comes with its token takes it from whoever holds it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import EngineFailed, InvalidInit, LingbotError, one_line
from lingbot_rt.server.live_session import LiveSession
from lingbot_rt.server.park_folder import ParkFolder
from lingbot_rt.session.plan import EnginePort
from lingbot_rt.session.server_messages import ResumeOffer

log = logging.getLogger(__name__)

CLOSE_LIMIT_S = 30.0
"""How long a stop may take to write sessions to --park-dir."""

_TOKEN_BYTES = 32


@dataclass(eq=False)
class KeptSession:
    """A session with a token. Of ``live`` and a file in the folder at least one is there."""

    digest: str  # of the token
    live: LiveSession | None = None
    is_open: bool = False  # on the engine
    world: bytes | None = None  # a snapshot, of one that is not open
    nbytes: int = 0  # of host memory, while it is parked
    leave: Callable[[], None] | None = None  # tells the connection that holds it that another one has come
    is_over: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set while it is parked wholly, or over
    timer: asyncio.TimerHandle | None = None
    written_at: int = 0  # chunk index of its newest snapshot on disk
    writing: asyncio.Task[Any] | None = None  # writes or deletes its file: one at a time

    @property
    def name(self) -> str:
        """For the log."""
        return "on disk" if self.live is None else self.live.id

    @property
    def is_parked(self) -> bool:
        return self.leave is None and self.changed.is_set() and not self.is_over


class Parking:
    """All methods are called from one event loop."""

    def __init__(self, config: ServeConfig, engine: EnginePort) -> None:
        self._engine = engine
        self._limit_s = config.resume_s
        self._max_bytes = config.parked_mb * 2**20
        self._every = config.snapshot_every
        # Part of what is hashed: a token works only with the API key under which it was given.
        self._key = (config.api_key or "").encode()
        self._folder = None if config.park_dir is None else ParkFolder(Path(config.park_dir))
        self._kept: dict[str, KeptSession] = {}  # by digest, those that parked first in front
        self._settling: set[asyncio.Task[None]] = set()

    @property
    def writes(self) -> bool:
        """Whether sessions outlive the server."""
        return self._folder is not None

    @property
    def count(self) -> int:
        """Parked sessions."""
        return sum(kept.is_parked for kept in self._kept.values())

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of parked sessions."""
        return sum(kept.nbytes for kept in self._kept.values() if kept.is_parked)

    async def find(self) -> None:
        """What an earlier server wrote is known from here on. Called before the engine is ready: a client that comes
        back at that moment must not hear that its session is over."""
        if self._folder is None:
            return
        for digest in await asyncio.to_thread(self._folder.found):
            kept = self._kept[digest] = KeptSession(digest)
            kept.changed.set()

    def started(self) -> None:
        """The engine is ready: clients have --resume-s from here on to come back to what an earlier server wrote."""
        for kept in self._kept.values():
            if kept.is_parked:
                self._start_timer(kept)

    # --- tokens ---

    def offer(self, live: LiveSession, leave: Callable[[], None]) -> tuple[KeptSession, ResumeOffer] | None:
        """A token for a session that has just opened; None when no session is kept."""
        if not self._limit_s:
            return None
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        digest = self._digest(token)
        kept = self._kept[digest] = KeptSession(digest, live, is_open=True, leave=leave)
        return kept, ResumeOffer(token, self._limit_s)

    async def claim(self, token: str, leave: Callable[[], None]) -> tuple[KeptSession, ResumeOffer]:
        """The session of ``token``, parked and now held by the caller. Raises InvalidInit with the field ``resume``."""
        digest = self._digest(token)
        while True:
            kept = next((each for each in self._kept.values() if hmac.compare_digest(each.digest, digest)), None)
            if kept is None:
                raise InvalidInit(
                    "no session has this token: it ended, or was parked for longer than "
                    f"--resume-s {self._limit_s:g}; send an init without resume",
                    field="resume",
                )
            if kept.is_parked:
                kept.leave = leave
                kept.changed.clear()
                self._stop_timer(kept)
                return kept, ResumeOffer(token, self._limit_s)
            if kept.leave is not None:
                kept.leave()
            await kept.changed.wait()

    async def world_of(self, kept: KeptSession) -> bytes:
        """The snapshot of a session that is not open. Raises InvalidInit with the field ``resume``."""
        world = kept.world
        if world is None and self._folder is not None:
            world = await asyncio.to_thread(self._folder.read, kept.digest)
        if world is None:
            await self.end(kept)
            raise InvalidInit("the session is lost: its snapshot cannot be read", field="resume")
        return world

    def opened(self, kept: KeptSession, live: LiveSession) -> None:
        """A session that was kept as a snapshot is open on the engine again."""
        kept.live, kept.is_open, kept.world = live, True, None
        if self._folder is not None and not self._every:
            kept.writing = asyncio.create_task(asyncio.to_thread(self._folder.delete, kept.digest))

    # --- from held to parked, and to the end ---

    def park(self, kept: KeptSession) -> None:
        """The client's line is lost. The chunk in work is finished meanwhile; ``settled`` waits for that."""
        kept.leave = None
        kept.changed.clear()
        self._kept[kept.digest] = self._kept.pop(kept.digest)  # the newest
        self._in_background(kept, self._settle(kept))

    def release(self, kept: KeptSession) -> None:
        """Whoever waited in line with it is gone."""
        kept.leave = None
        self._start_timer(kept)
        kept.changed.set()

    async def settled(self) -> None:
        """Returns when no session is on its way to be parked: then the engine can make room for another one."""
        while self._settling:
            await asyncio.wait(set(self._settling))

    async def end(self, kept: KeptSession, reason: str | None = None) -> None:
        """The session is over. ``reason``: of one that nobody came back for, in one word for metrics and log."""
        kept.is_over, kept.leave = True, None
        self._kept.pop(kept.digest, None)
        self._stop_timer(kept)
        kept.changed.set()
        if kept.writing is not None:
            await asyncio.wait({kept.writing})
        if self._folder is not None:
            await asyncio.to_thread(self._folder.delete, kept.digest)
        live, kept.world = kept.live, None
        if reason is None or live is None:
            return
        if kept.is_open:
            await self._engine.close(live.id)
        live.telemetry.ended(reason, time.monotonic())
        await live.over(reason)

    async def _settle(self, kept: KeptSession) -> None:
        live = kept.live
        assert live is not None
        await live.settle()
        kept.nbytes = await self._engine.park(live.id) + live.frame_bytes
        log.info("session %s is parked: %.1f MB, for %g s", live.id, kept.nbytes / 1e6, self._limit_s)
        self._start_timer(kept)
        kept.changed.set()
        await self._make_room()

    async def _make_room(self) -> None:
        """Keeps the oldest parked sessions as snapshots, and ends the oldest of these, until the rest fits."""
        while self.nbytes > self._max_bytes:
            parked = [kept for kept in self._kept.values() if kept.is_parked and kept.nbytes]
            shrinkable = next((kept for kept in parked if kept.is_open), None)
            if shrinkable is None:
                log.warning("a parked session ends: --parked-mb is reached")
                await self._or_end(parked[0], self.end(parked[0], "parked_full"))
                continue
            shrinkable.changed.clear()
            await self._or_end(shrinkable, self._shrink(shrinkable))
            shrinkable.changed.set()

    async def _shrink(self, kept: KeptSession) -> None:
        live = kept.live
        assert live is not None
        kept.world = await self._engine.snapshot(live.id, live.about())
        await self._engine.close(live.id)
        await live.over("the session was kept as a snapshot")
        kept.is_open, kept.nbytes = False, len(kept.world)
        log.info("session %s is kept as a snapshot of %.1f MB (--parked-mb)", live.id, kept.nbytes / 1e6)

    # --- on disk ---

    async def boundary(self, kept: KeptSession) -> None:
        """Between two chunks: writes the session if it is time (--snapshot-every). The disk is not waited for."""
        live = kept.live
        if not self._every or live is None or self._folder is None:
            return
        index = live.session.next_index
        is_busy = kept.writing is not None and not kept.writing.done()
        if (index < kept.written_at + self._every and index >= kept.written_at) or is_busy:
            return
        kept.written_at = index
        try:
            data = await self._engine.snapshot(live.id, live.about())
        except LingbotError as error:
            log.error("session %s cannot be written: %s", live.id, error)
            return
        kept.writing = asyncio.create_task(asyncio.to_thread(self._folder.write, kept.digest, data))

    async def close(self) -> None:
        """The server stops. Sessions are written if there is a folder for them, for CLOSE_LIMIT_S at the longest."""
        for kept in self._kept.values():
            self._stop_timer(kept)
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self.settled()
                for kept in list(self._kept.values()):
                    await self._failure(kept, self._leave(kept))  # if one cannot be written, the others are
        except TimeoutError:
            log.error("not every session could be written within %g s", CLOSE_LIMIT_S)

    async def _leave(self, kept: KeptSession) -> None:
        """Writes one session for the next server, and ends it in this one."""
        live, folder = kept.live, self._folder
        if live is None or kept.leave is not None:
            return  # it is on disk, or its connection could not be ended in time
        is_written = False
        if kept.writing is not None:
            await asyncio.wait({kept.writing})  # two writers would share one unfinished file
        try:
            if folder is not None:
                data = kept.world or await self._engine.snapshot(live.id, live.about())
                is_written = await asyncio.to_thread(folder.write, kept.digest, data)
        finally:
            live.telemetry.ended("parked" if is_written else "shutting_down", time.monotonic())
            await live.end_record("the server stopped")
        if is_written:
            log.info("session %s waits in --park-dir for the next start", live.id)

    # --- the rest ---

    def _digest(self, token: str) -> str:
        return hmac.digest(self._key, token.encode(), "sha256").hex()

    def _start_timer(self, kept: KeptSession) -> None:
        self._stop_timer(kept)
        loop = asyncio.get_running_loop()
        kept.timer = loop.call_later(self._limit_s, lambda: self._in_background(kept, self._expire(kept)))

    async def _expire(self, kept: KeptSession) -> None:
        while kept.leave is None and not kept.changed.is_set():
            await kept.changed.wait()  # it is made a snapshot just now
        if kept.is_parked:  # nobody came in the last moment
            await self.end(kept, "not_resumed")

    @staticmethod
    def _stop_timer(kept: KeptSession) -> None:
        if kept.timer is not None:
            kept.timer.cancel()
            kept.timer = None

    def _in_background(self, kept: KeptSession, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._or_end(kept, work))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _or_end(self, kept: KeptSession, work: Coroutine[Any, Any, None]) -> None:
        """A session that ``work`` breaks for is over: whoever comes with its token must not wait for ever."""
        failure = await self._failure(kept, work)
        if failure is not None and not kept.is_over:
            await self.end(kept, failure.code)

    @staticmethod
    async def _failure(kept: KeptSession, work: Coroutine[Any, Any, None]) -> LingbotError | None:
        """The edge of what is done with a session that nobody plays: what ``work`` raised, logged and named."""
        try:
            await work
        except LingbotError as error:
            log.error("session %s cannot be kept: %s", kept.name, error)
            return error
        except Exception as error:
            log.exception("session %s cannot be kept", kept.name)
            return EngineFailed(one_line(error))
        return None
