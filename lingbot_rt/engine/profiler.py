"""Records a torch profiler trace of chunks while sessions run. Without a request a chunk pays one comparison."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)


class _Recording:
    """One trace. ``step`` and ``stop`` are called on the engine thread: the profiler sees the thread that starts it."""

    def __init__(self, chunks: int, device: torch.device) -> None:
        self.recorded = 0
        self.complete = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._chunks = chunks
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._is_running = self._is_over = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one chunk. What breaks the profiler breaks no chunk."""
        if self._is_over:
            yield
            return
        self._start()
        try:
            yield
        finally:
            if self._is_running:
                self.recorded += 1
            if self.recorded == self._chunks:
                self.stop()

    def _start(self) -> None:
        if not self._is_running:
            try:
                self._profile.start()
                self._is_running = True
            except RuntimeError:
                log.exception("the profiler did not start")
                self._end()

    def stop(self) -> None:
        """Ends the recording, if it has begun."""
        if self._is_running and not self._is_over:
            try:
                self._profile.stop()
            except RuntimeError:
                log.exception("the profiler did not stop")
                self.recorded = 0
        if not self._is_over:
            self._end()

    def write(self, file: Path) -> None:
        """As a Chrome trace. Raises OSError."""
        self._profile.export_chrome_trace(str(file))

    def _end(self) -> None:
        self._is_over = True
        self._loop.call_soon_threadsafe(self.complete.set)


class ChunkProfiler:
    """At most one recording at a time: ``record`` waits for the chunks that the engine thread runs in ``chunk``."""

    def __init__(self) -> None:
        self._recording: _Recording | None = None

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """Around every chunk, on the engine thread."""
        recording = self._recording
        if recording is None:
            yield
            return
        with recording.step():
            yield

    async def record(
        self,
        chunks: int,
        file: Path,
        limit_s: float,
        device: torch.device,
        on_thread: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> int:
        """Writes the next ``chunks`` chunks, or those within ``limit_s``, to ``file``; how many there are.

        Without a chunk nothing is written. Raises OSError when the file cannot be written, and what ``on_thread``
        raises.
        """
        assert self._recording is None, "one at a time"
        recording = self._recording = _Recording(chunks, device)
        try:
            async with asyncio.timeout(limit_s):
                await recording.complete.wait()
        except TimeoutError:
            pass
        finally:
            self._recording = None
            await on_thread(recording.stop)
        if recording.recorded:
            # Beside the chunks that go on: the file may have a hundred megabytes.
            await asyncio.to_thread(recording.write, file)
        return recording.recorded
