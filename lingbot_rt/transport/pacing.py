"""Pacing: when the frames of a session may leave, and when its next chunk is worth starting.

Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

Clock = Callable[[], float]

EARLY_CHUNKS = 2
"""How far keys may take a paced world ahead of its pace, in chunks: pressing and letting go are answered at once."""

_SHORTEST_WAIT_S = 0.005  # between two looks at a stream that is held up


class Pacer:
    """Lets frames leave no faster than ``fps``, and says how late a chunk may start. ``math.inf``: nothing ever waits.

    A stream that fell behind does not catch up in a burst. A new event id starts the clock anew: what the player just
    did is shown at once. ``chunk_frames`` is the usual length of a chunk.
    """

    def __init__(self, fps: float, chunk_frames: int, clock: Clock = time.monotonic) -> None:
        self._fps = fps
        self._clock = clock
        self._next_due = clock()
        self._planned = 0  # frames of chunks that have started, not due yet
        self._unpaced = 0  # of those, the ones that leave as soon as they can
        self._event_id: int | None = None
        self._bucket = TokenBucket(EARLY_CHUNKS * chunk_frames / fps, clock)
        self._woken = asyncio.Event()
        self._flushed = asyncio.Event()

    def wake(self) -> None:
        """An event came: frames planned before it leave without waiting, and a waiting chunk may start early."""
        self._unpaced = self._planned
        self._woken.set()
        self._flushed.set()

    def plan(self, num_frames: int) -> None:
        """A chunk of ``num_frames`` has started; events that came before are in it."""
        self._planned += num_frames
        self._woken.clear()

    async def until_due(self, num_frames: int, event_id: int | None) -> float:
        """Waits until the next ``num_frames`` frames may leave; the milliseconds it waited."""
        begin = self._clock()
        due = self.due(num_frames, event_id)
        self._flushed.clear()
        if due > self._clock():
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
            try:
                async with asyncio.timeout(due - self._clock()):
                    await self._flushed.wait()
                self._next_due = self._clock()
            except TimeoutError:
                pass
        return 1000 * (self._clock() - begin)

    def due(self, num_frames: int, event_id: int | None) -> float:
        """The time at which the next ``num_frames`` frames may leave; they count as sent then."""
        now = self._clock()
        if event_id != self._event_id or self._unpaced:
            self._event_id = event_id
            self._next_due = now
        self._planned = max(self._planned - num_frames, 0)
        self._unpaced = max(self._unpaced - num_frames, 0)
        due = max(self._next_due, now)
        self._next_due = due + num_frames / self._fps
        return due

    @property
    def due_at(self) -> float:
        """When the first frames of the next chunk may leave."""
        return self.worth_starting_at(0.0)

    def worth_starting_at(self, expected_s: float) -> float:
        """The time before which starting a chunk only makes its first frames wait.

        ``expected_s`` is the time from a chunk's start to its first frames.
        """
        return max(self._next_due, self._clock()) + (self._planned - self._unpaced) / self._fps - expected_s

    async def until_worth_starting(self, expected_s: float) -> float:
        """Waits for ``worth_starting_at``, or for an event as far as the bucket goes; the milliseconds it waited."""
        begin = self._clock()
        while (early_s := self.worth_starting_at(expected_s) - self._clock()) > 0:
            try:
                async with asyncio.timeout(max(early_s, _SHORTEST_WAIT_S)):
                    await self._woken.wait()
            except TimeoutError:
                continue  # frames may have left meanwhile, or been held up
            await asyncio.sleep(self._bucket.wait_s(self.worth_starting_at(expected_s) - self._clock()))
            self._bucket.spend(self.worth_starting_at(expected_s) - self._clock())
            break
        return 1000 * (self._clock() - begin)


class TokenBucket:
    """How far events may take a paced stream ahead of its pace: at most ``capacity_s`` seconds of playing time.

    A chunk that starts early for an event spends what it is early. The bucket fills as fast as time goes by. A few keys
    are answered at once, and a mouse that never rests makes the world run at twice its pace at most.
    """

    def __init__(self, capacity_s: float, clock: Clock = time.monotonic) -> None:
        self._capacity_s = capacity_s
        self._clock = clock
        self._full_at = -math.inf

    def wait_s(self, early_s: float) -> float:
        """How long a start that is now ``early_s`` early has to wait until the bucket covers it."""
        level_s = self._capacity_s - max(self._full_at - self._clock(), 0.0)
        return max(early_s - level_s, 0.0) / 2  # meanwhile the bucket fills, and the start is less and less early

    def spend(self, early_s: float) -> None:
        self._full_at = max(self._full_at, self._clock()) + max(early_s, 0.0)
