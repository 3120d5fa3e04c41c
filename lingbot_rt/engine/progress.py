"""Whether the engine thread gets on with its work. A kernel, a driver call or a lock may never return."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

POLL_S = 1.0
"""Most seconds between two looks at the thread."""


class ThreadProgress:
    """Seen from another thread. ``job`` is entered on the watched thread, ``stalled_s`` is called by the watcher."""

    def __init__(self, marks: Callable[[], Hashable]) -> None:
        """``marks``: any value that changes when the work gets on."""
        self._marks = marks
        self._jobs = 0
        self._thread: int | None = None  # while a job is in work
        self._last: Hashable = None
        self._looked_at = 0.0
        self._stalled_s = 0.0

    @contextmanager
    def job(self) -> Iterator[None]:
        self._jobs += 1
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def stalled_s(self) -> float:
        """Seconds for which a job has been in work without progress, as far as the calls of this method show it."""
        now = time.monotonic()
        # A longer gap between two calls says that this whole process stood still, not that the thread did.
        passed_s = min(now - self._looked_at, 2 * POLL_S)
        marks = (self._jobs, self._marks())
        if self._thread is None or marks != self._last:
            self._stalled_s = 0.0
        else:
            self._stalled_s += passed_s
        self._last, self._looked_at = marks, now
        return self._stalled_s

    def cpu_s(self) -> float:
        """CPU time of the thread with a job in work; 0 where the system does not tell.

        On a CPU a forward may take minutes without another sign of progress.
        """
        thread = self._thread
        if thread is None or not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(thread))

    def stack(self) -> str:
        """Where the thread is."""
        frame = sys._current_frames().get(self._thread or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""
