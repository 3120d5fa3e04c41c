"""From the session's generator to its socket: a bounded queue, paced when asked, with a limit on every send.

Frames are never dropped while a session lives. A client that does not read fills the outbox, which stops its
generator, and loses its session when one send takes longer than the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from lingbot_rt.errors import ClientTooSlow

Clock = Callable[[], float]
Send = Callable[[bytes], Awaitable[None]]


class Pacer:
    """When frames may leave so that a stream is no faster than ``fps`` frames/s. Times are seconds of ``clock``.

    A stream that fell behind does not catch up in a burst, and a new event id starts the clock anew: what the player
    just did is shown at once.
    """

    def __init__(self, fps: float, clock: Clock = time.monotonic) -> None:
        self._fps = fps
        self._clock = clock
        self._next = clock()
        self._event_id: int | None = None

    def due(self, num_frames: int, event_id: int | None) -> float:
        """The time at which the next ``num_frames`` frames may leave; they are counted as sent."""
        now = self._clock()
        if event_id != self._event_id:
            self._event_id = event_id
            self._next = now
        start = max(self._next, now)
        self._next = start + num_frames / self._fps
        return start

    def worth_starting_at(self, expected_s: float) -> float:
        """The time before which starting a chunk only makes its first frames wait.

        ``expected_s`` is the time from a chunk's start to its first frames. Starting later samples fresher keys.
        """
        return self._next - expected_s


class HeadStart:
    """How far events may take a paced stream ahead of its pace: a credit of playing time, in seconds.

    A chunk started for an event, before it is worth starting, spends what it is early. The credit grows back as fast
    as time goes by, up to ``most_s``: a few keys are answered at once, and a mouse that never rests makes the world
    run at twice its pace at most.
    """

    def __init__(self, most_s: float, clock: Clock = time.monotonic) -> None:
        self._most_s = most_s
        self._clock = clock
        self._full_at = -math.inf  # when the credit is whole again

    def wait_s(self, early_s: float) -> float:
        """How long a start that is now ``early_s`` early has to wait until the credit covers it."""
        missing_s = early_s - (self._most_s - max(self._full_at - self._clock(), 0.0))
        return max(missing_s, 0.0) / 2  # meanwhile the credit grows, and the start is less and less early

    def spend(self, early_s: float) -> None:
        self._full_at = max(self._full_at, self._clock()) + max(early_s, 0.0)


@dataclass(frozen=True, slots=True)
class SendTimes:
    """What sending one parcel took, in milliseconds."""

    pace_wait_ms: float  # held back until it was due
    header_write_ms: float  # the first message
    raw_write_ms: float  # the rest
    sent_at: float  # time.monotonic() of the end


@dataclass(frozen=True, slots=True)
class Parcel:
    """Wire messages that leave together, nothing in between."""

    messages: tuple[bytes, ...]
    due: float | None = None  # not before this time.monotonic()
    on_sent: Callable[[SendTimes], None] | None = None

    @property
    def nbytes(self) -> int:
        return sum(len(message) for message in self.messages)


class Outbox:
    """At most ``max_parcels`` parcels and ``max_bytes`` bytes wait; one parcel of any size always fits an empty one."""

    def __init__(self, *, max_parcels: int, max_bytes: int, send_timeout_s: float) -> None:
        self._max_parcels = max_parcels
        self._max_bytes = max_bytes
        self._send_timeout_s = send_timeout_s
        self._parcels: deque[Parcel] = deque()
        self._bytes = 0
        self._closed = False
        self._is_sealed = False
        self._hurried = asyncio.Event()
        self._changed = asyncio.Condition()

    @property
    def parcels(self) -> int:
        """Parcels put and not wholly sent yet."""
        return len(self._parcels)

    async def put(self, parcel: Parcel) -> None:
        """Waits for room. After ``last_words`` it is forgotten, after ``close`` alone it raises RuntimeError."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_sealed or self._closed or self._has_room(parcel))
            if self._is_sealed:
                return
            if self._closed:
                raise RuntimeError("the outbox is closed")
            self._parcels.append(parcel)
            self._bytes += parcel.nbytes
            self._changed.notify_all()

    async def wait_for_at_most(self, parcels: int) -> None:
        """Returns once no more than ``parcels`` wait to be sent."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._parcels) <= parcels)

    async def close(self) -> None:
        """``pump`` sends what is here and returns; nothing more may be put."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def hurry(self) -> None:
        """What waits for its time leaves at once: something newer is coming behind it."""
        self._parcels = deque(replace(parcel, due=None) for parcel in self._parcels)
        self._hurried.set()

    async def last_words(self, parcel: Parcel) -> None:
        """``parcel`` follows the one in work, which goes out whole and at once; all that waits or is put later is
        forgotten, other last words too."""
        async with self._changed:
            if self._is_sealed:
                return
            self._is_sealed = True
            while len(self._parcels) > 1:
                self._bytes -= self._parcels.pop().nbytes
            self._parcels.append(parcel)
            self._bytes += parcel.nbytes
            self.hurry()
            self._changed.notify_all()

    async def pump(self, send: Send) -> None:
        """Sends parcel by parcel until closed and empty. Raises ClientTooSlow when one message takes too long."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._closed or bool(self._parcels))
                if not self._parcels:
                    return
                parcel = self._parcels[0]
            times = await self._send(parcel, send)
            if parcel.on_sent is not None:
                parcel.on_sent(times)
            async with self._changed:
                self._parcels.popleft()
                self._bytes -= parcel.nbytes
                self._changed.notify_all()

    def _has_room(self, parcel: Parcel) -> bool:
        if not self._parcels:
            return True
        return len(self._parcels) < self._max_parcels and self._bytes + parcel.nbytes <= self._max_bytes

    async def _send(self, parcel: Parcel, send: Send) -> SendTimes:
        begin = time.monotonic()
        if parcel.due is not None and parcel.due > begin:
            self._hurried.clear()
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(parcel.due - begin):
                    await self._hurried.wait()
        marks = [time.monotonic()]
        for message in parcel.messages:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientTooSlow(
                    f"the client read nothing for {self._send_timeout_s:g} s (--send-timeout-s)"
                ) from None
            marks.append(time.monotonic())
        first = marks[min(1, len(marks) - 1)]
        return SendTimes(
            pace_wait_ms=1000 * (marks[0] - begin),
            header_write_ms=1000 * (first - marks[0]),
            raw_write_ms=1000 * (marks[-1] - first),
            sent_at=marks[-1],
        )
