"""Measures a running server under many clients at once: waiting in line, first frames, cadence, errors.

Each client opens a session, waits in line for it, takes its frames to ``max_chunks`` and opens the next one. Messages
are counted, not decoded, so that one process can be many clients.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from lingbot_rt.bench.figures import Spread, number, spread_of, table
from lingbot_rt.client import (
    ConnectFailed,
    InitRefused,
    KeyRefused,
    MessageRefused,
    ProtocolError,
    SessionLost,
    connect,
)

PROGRESS_S = 0.25
"""Between two calls of ``on_progress``."""

RETRY_S = 1.0
"""How long a client that got an error waits before it asks again."""

_FATAL = {kind.code: kind for kind in (InitRefused, KeyRefused, MessageRefused)} | {"capacity": InitRefused}
"""Errors that every further session of the load would get too."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    url: str
    api_key: str | None
    init: Mapping[str, Any]  # arguments of ``client.connect``, max_chunks and protocol_extensions among them
    clients: int
    for_s: float  # the clients leave after this time
    rounds: int | None  # sessions that each client plays; None: as many as fit


@dataclass(eq=False, slots=True)
class Visit:
    """One session as its client sees it, from opening the socket on, in seconds of the monotonic clock."""

    asked_at: float
    queued: bool = False  # the server said that it waits in line
    granted_at: float | None = None  # its turn came
    first_frame_at: float | None = None
    chunk_ends: list[float] = field(default_factory=list)  # when the statistics of each chunk came, after its frames
    chunk_frames: list[int] = field(default_factory=list)
    received_bytes: int = 0
    error: str | None = None  # its code
    ended_at: float | None = None  # None: it was open when the time was up

    @property
    def is_waiting(self) -> bool:
        return self.ended_at is None and self.granted_at is None

    @property
    def is_playing(self) -> bool:
        return self.ended_at is None and self.granted_at is not None


class _Message(msgspec.Struct):
    """What is read of a server's message."""

    type: str
    code: str = "error"
    content: str = ""
    position: int | None = None
    num_frames: int = 0


@dataclass(frozen=True, slots=True)
class LoadReport:
    url: str
    model: Mapping[str, Any]  # some fields of the model's entry in /v1/models
    init: Mapping[str, Any]
    clients: int
    took_s: float
    sessions: int  # that got a frame
    completed: int  # that reached max_chunks
    playing_at_end: int
    waiting_at_end: int
    longest_wait_s: float  # of those that still waited, too
    waiting_ms: Spread | None  # in line, of the sessions whose turn came; 0 without a line
    start_ms: Spread | None  # from a session's turn to its first frame
    first_frame_ms: Spread | None  # from opening the socket to the first frame
    chunk_interval_ms: Spread | None  # between the ends of neighbouring chunks of a session
    session_frames_per_s: Spread | None  # of each session, from the end of its first chunk on
    frames: int
    frames_per_s: float  # of all sessions together
    received_bytes: int
    errors: dict[str, int]  # by code


class Load:
    """The clients of one measurement, and what they saw."""

    def __init__(self, spec: LoadSpec) -> None:
        self.visits: list[Visit] = []
        self._spec = spec
        self._has_connected = False
        self._began = time.monotonic()
        self._ended: float | None = None

    def run(self, on_progress: Callable[[float, str], object]) -> None:
        """Calls ``on_progress`` with the seconds so far and what the clients do.

        Raises ClientError if the server cannot be reached at all, or refuses what every session of the load sends.
        """
        try:
            asyncio.run(self._run(on_progress))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _run(self, on_progress: Callable[[float, str], object]) -> None:
        self._began = time.monotonic()
        clients = asyncio.create_task(self._clients())
        try:
            while not clients.done() and self.took_s < self._spec.for_s:
                await asyncio.wait({clients}, timeout=min(PROGRESS_S, self._spec.for_s - self.took_s))
                on_progress(self.took_s, self._state())
        finally:
            self._ended = time.monotonic()
            clients.cancel()
            await asyncio.wait({clients})
        if not clients.cancelled():
            clients.result()

    @property
    def ended_at(self) -> float:
        """When the time was up, on the clock of the visits; now, as long as it is not."""
        return time.monotonic() if self._ended is None else self._ended

    @property
    def took_s(self) -> float:
        return self.ended_at - self._began

    def _state(self) -> str:
        playing = sum(visit.is_playing for visit in self.visits)
        waiting = sum(visit.is_waiting for visit in self.visits)
        ended = sum(visit.ended_at is not None for visit in self.visits)
        return f"{playing} playing, {waiting} waiting, {ended} ended"

    async def _clients(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._spec.clients):
                clients.create_task(self._client())

    async def _client(self) -> None:
        played = 0
        while self._spec.rounds is None or played < self._spec.rounds:
            visit = Visit(time.monotonic())
            self.visits.append(visit)
            await self._visit(visit)
            played += 1
            if visit.error is not None:
                await asyncio.sleep(RETRY_S)

    async def _visit(self, visit: Visit) -> None:
        try:
            async with connect(self._spec.url, api_key=self._spec.api_key, **self._spec.init) as session:
                self._has_connected = True
                is_payload = False
                async for message in session.messages():
                    visit.received_bytes += len(message)
                    is_payload = not is_payload and _take(visit, message)
                    if visit.error is not None:
                        break
        except SessionLost as error:
            visit.error = visit.error or error.code
        except ConnectFailed as error:
            if not (self._has_connected and error.reconnectable):
                raise
            visit.error = error.code
        visit.ended_at = time.monotonic()


def _take(visit: Visit, data: bytes | str) -> bool:
    """Notes one message; whether the next one is its payload. Raises ClientError for an error that will come again."""
    now = time.monotonic()
    try:
        message = msgspec.msgpack.decode(data if isinstance(data, bytes) else data.encode(), type=_Message)
    except msgspec.MsgspecError:
        raise ProtocolError(f"a message of {len(data)} bytes is not a MessagePack map with a type") from None
    match message.type:
        case "queue":
            visit.queued = True
            if message.position == 0:
                visit.granted_at = now
        case "session" | "warming" | "frame_batch" | "frame_batch_header":
            if visit.granted_at is None:
                visit.granted_at = now if visit.queued else visit.asked_at
            if message.type.startswith("frame_batch") and visit.first_frame_at is None:
                visit.first_frame_at = now
        case "chunk_stats":
            visit.chunk_ends.append(now)
            visit.chunk_frames.append(message.num_frames)
        case "error":
            if message.code in _FATAL:
                raise _FATAL[message.code](message.content)
            visit.error = message.code
    return message.type == "frame_batch_header"


def load_report(spec: LoadSpec, model: Mapping[str, Any], load: Load) -> LoadReport:
    visits, took_s = load.visits, load.took_s
    begun = [(visit, visit.first_frame_at) for visit in visits if visit.first_frame_at is not None]
    granted = [(visit, visit.granted_at - visit.asked_at) for visit in visits if visit.granted_at is not None]
    waits = [seconds for _, seconds in granted] + [
        load.ended_at - visit.asked_at for visit in visits if visit.is_waiting
    ]
    frames = sum(sum(visit.chunk_frames) for visit in visits)
    return LoadReport(
        url=spec.url,
        model=model,
        init={name: value for name, value in spec.init.items() if name != "first_frame"},
        clients=spec.clients,
        took_s=took_s,
        sessions=len(begun),
        completed=sum(visit.ended_at is not None and visit.error is None for visit, _ in begun),
        playing_at_end=sum(visit.is_playing for visit in visits),
        waiting_at_end=sum(visit.is_waiting for visit in visits),
        longest_wait_s=max(waits, default=0.0),
        waiting_ms=spread_of([1000 * seconds for _, seconds in granted]),
        start_ms=spread_of([1000 * (first - (visit.granted_at or first)) for visit, first in begun]),
        first_frame_ms=spread_of([1000 * (first - visit.asked_at) for visit, first in begun]),
        chunk_interval_ms=spread_of(
            [1000 * (after - before) for visit, _ in begun for before, after in pairwise(visit.chunk_ends)]
        ),
        session_frames_per_s=spread_of(
            [
                sum(visit.chunk_frames[1:]) / (visit.chunk_ends[-1] - visit.chunk_ends[0])
                for visit, _ in begun
                if len(visit.chunk_ends) > 1
            ]
        ),
        frames=frames,
        frames_per_s=frames / took_s,
        received_bytes=sum(visit.received_bytes for visit in visits),
        errors=dict(sorted(Counter(visit.error for visit in visits if visit.error is not None).items())),
    )


def as_text(report: LoadReport) -> str:
    rows = [
        [name, *((number(each.p50), number(each.p95), number(each.p99), str(each.count)) if each else ("-",) * 4)]
        for name, each in (
            ("waiting in line, ms", report.waiting_ms),
            ("turn to first frame, ms", report.start_ms),
            ("first frame with waiting, ms", report.first_frame_ms),
            ("chunk to chunk, ms", report.chunk_interval_ms),
            ("frames/s of a session", report.session_frames_per_s),
        )
    ]
    model = ", ".join(str(value) for value in report.model.values())
    errors = ", ".join(f"{code} {count}" for code, count in report.errors.items()) or "none"
    return "\n".join(
        [
            f"{report.url}{': ' if model else ''}{model}",
            f"{report.clients} clients for {report.took_s:.1f} s: {report.sessions} sessions began, "
            f"{report.completed} completed; {report.playing_at_end} still played, {report.waiting_at_end} still waited",
            f"{report.frames} frames, {report.frames_per_s:.1f} frames/s and "
            f"{report.received_bytes / report.took_s / 1e6:.2f} MB/s in all",
            "",
            table(("", "p50", "p95", "p99", "count"), rows),
            "",
            f"longest wait {report.longest_wait_s:.2f} s, with those who still waited",
            f"errors: {errors}",
        ]
    )
