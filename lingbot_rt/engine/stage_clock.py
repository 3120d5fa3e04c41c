"""Times the stages of a chunk: by the host clock on a CPU, by device events on a GPU, so that no stage waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, tuple[Any, Any]] = {}
        self._started = time.perf_counter()

    @property
    def total_ms(self) -> float:
        """Wall time since creation."""
        return 1000 * (time.perf_counter() - self._started)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Marks the start and the end of a stage on the current stream."""
        begin = self._mark()
        yield
        self._marks[name] = (begin, self._mark())

    def finish(self) -> dict[str, float]:
        """Waits for the device; returns milliseconds by stage."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return {name: begin.elapsed_time(end) for name, (begin, end) in self._marks.items()}
        return {name: 1000 * (end - begin) for name, (begin, end) in self._marks.items()}

    def _mark(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()
