"""What a client keeps of a session, so that it can go on after a lost line. No socket, and time is an argument.

``ReceivedFrames`` is what a server is told that it need not send again, ``EventsInFlight`` what it may not have heard,
``Retry`` how long a lost line is tried for.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingbot_rt.errors import InitRefused, OutputFailed, SaveFailed, quoted, reason_of

NEEDED_EXTENSIONS = ("session", "control_ack", "history")
"""What a client that comes back asks a server for. The last one says that the server keeps worlds at all."""

RESUME_FIELDS = (
    "received_chunk",
    "received_frames",
    "protocol_extensions",
    "realtime_output_format",
    "output_compression",
    "realtime_preview_max_width",
    "realtime_output_pacing",
    "max_chunks",
    "profile",
)
"""Fields that may stand beside ``resume`` in an init. Everything else is the kept world's own."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,}")
_KEPT_EVENTS = 1024
_DELAYS_S = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_ANSWERED = ("rewind", "branch", "save")
"""Events with an answer of their own. Until it comes they are sent again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session went on: after a rewind, or after a lost line."""

    chunk_index: int | None  # of the next frames; None where the server does not tell
    branch: int | None
    exact: bool  # False: the world is like the one before, not the same


@dataclass(frozen=True, slots=True)
class SavedWorld:
    """A snapshot of a session, as ``save`` writes it."""

    chunk_index: int  # the chunk that comes next in it
    data: bytes


class ReceivedFrames:
    """The newest chunk of the session's line, and how many of its pixel frames have come."""

    def __init__(self) -> None:
        self._chunk = 0
        self._frames = 0

    def add(self, chunk_index: int, frames: int) -> None:
        if chunk_index != self._chunk:
            self._chunk, self._frames = chunk_index, 0
        self._frames += frames

    def went_on_at(self, chunk_index: int) -> None:
        """The next frames are those of ``chunk_index``: nothing of it, or of later chunks, has come."""
        self._chunk, self._frames = chunk_index, 0

    def resumed_at(self, chunk_index: int) -> None:
        """A server that came back with an older world makes its later chunks again."""
        if chunk_index < self._chunk:
            self.went_on_at(chunk_index)

    def fields(self) -> dict[str, int]:
        """What an init that resumes says of them. A server that is told nothing takes all that it sent for received."""
        return {"received_chunk": self._chunk, "received_frames": self._frames}


@dataclass(slots=True)
class _Sent:
    event_id: int
    kind: str
    message: bytes
    is_sent: bool = False  # on the line that is open now
    is_received: bool = False


class EventsInFlight:
    """Events that a server has not acknowledged. It answers to each in order, so a refusal is of the oldest one."""

    def __init__(self) -> None:
        self._events: OrderedDict[int, _Sent] = OrderedDict()

    def add(self, event_id: int, kind: str, message: bytes) -> None:
        self._events[event_id] = _Sent(event_id, kind, message)
        if len(self._events) > _KEPT_EVENTS:
            self._events.popitem(last=False)

    def take(self, event_id: int) -> bool:
        """Whether the event has to be sent now; False if ``take_all`` did it already."""
        event = self._events.get(event_id)
        if event is None or event.is_sent:
            return event is None
        event.is_sent = True
        return True

    def take_all(self) -> list[bytes]:
        """The messages to send on a new line, in order."""
        for event in self._events.values():
            event.is_sent, event.is_received = True, False
        return [event.message for event in self._events.values()]

    def received(self, event_id: int) -> None:
        event = self._events.get(event_id)
        if event is not None and event.kind in _ANSWERED:
            event.is_received = True
        else:
            self._events.pop(event_id, None)

    def answered(self, event_id: int) -> None:
        self._events.pop(event_id, None)

    def refused(self, event_id: object = None) -> int | None:
        """The id of the event that the server refused just now. None: of none that is known.

        ``event_id``: where the server says it.
        """
        if isinstance(event_id, int) and self._events.pop(event_id, None) is not None:
            return event_id
        sent = [event for event in self._events.values() if event.is_sent]
        event = next((event for event in sent if not event.is_received), sent[0] if sent else None)
        if event is None:
            return None
        del self._events[event.event_id]
        return event.event_id


class Retry:
    """When a lost line is tried again: at once, then ever more rarely, until ``limit_s`` have passed in silence."""

    def __init__(self, limit_s: float, now: float) -> None:
        self._limit_s = limit_s
        self._until = now + limit_s
        self._tries = 0

    def delay_s(self, now: float) -> float | None:
        """Seconds until the next try; None: no more. The first one is always made."""
        delay = min(_DELAYS_S[min(self._tries, len(_DELAYS_S) - 1)], self._limit_s)
        if self._tries and now + delay > self._until:
            return None
        self._tries += 1
        return delay

    def server_loads(self, now: float) -> None:
        """The server is there, but its model is still loading: its own time counts from when it is ready."""
        self._until = now + self._limit_s


def resume_fields(resume: str | Path | bytes, **fields: object) -> dict[str, object]:
    """The init that goes on with a kept world: a token, a file, or the bytes of one.

    A text is a token if it looks like one and names no file. Raises InitRefused for fields that the world has itself,
    and for a file that cannot be read.
    """
    for name in fields:
        if name not in RESUME_FIELDS:
            raise InitRefused(
                f"{quoted(name)}: a kept world has its own; expected beside resume: {', '.join(RESUME_FIELDS)}",
                field=name,
            )
    given = {name: value for name, value in fields.items() if value is not None}
    return {"type": "init", "resume": _kept_world(resume), **given}


def _kept_world(resume: str | Path | bytes) -> str | bytes:
    if isinstance(resume, bytes):
        return resume
    if isinstance(resume, str) and is_token(resume):
        return resume
    try:
        return Path(resume).read_bytes()
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "no path of a file"
        raise InitRefused(
            f"resume: {quoted(str(resume))}: {reason}, expected a saved world or the token of a session", field="resume"
        ) from None


def is_token(resume: str) -> bool:
    """Whether ``resume`` is taken as a session's token, not as a file."""
    return _TOKEN.fullmatch(resume) is not None and not os.path.exists(resume)


def write_world(path: str | Path, data: bytes) -> None:
    """Writes the file as a whole or not at all. Raises OutputFailed."""
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "no path of a file"
        raise OutputFailed(f"{quoted(str(path))}: {reason}") from None


def world_of(fields: dict[str, Any]) -> SavedWorld | SaveFailed:
    """A ``world`` message as a file, or the error for one that has none."""
    data, chunk_index = fields.get("payload"), fields.get("chunk_index")
    if not isinstance(data, bytes) or not isinstance(chunk_index, int):
        return SaveFailed("save: the server's answer has no world")
    return SavedWorld(chunk_index, data)
