"""What ``client`` and ``generate`` show of a walk: a progress bar, the measurements, and where the frames are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lingbot_rt.client.protocol import ChunkStats
from lingbot_rt.commands.frame_writer import open_writer
from lingbot_rt.commands.local_engine import bar_size
from lingbot_rt.commands.output import note, say
from lingbot_rt.shapes import num_frames_for

_LINE_INTERVAL_S = 10.0


def frames_of_walk(chunks: int, latent_frames: int, rate: int = 1) -> int:
    """Pixel frames of ``chunks`` chunks. ``rate``: frames per generated frame, except before the first one."""
    return rate * num_frames_for(chunks * latent_frames) - (rate - 1)


class WalkProgress:
    """A bar on a terminal; otherwise a line on standard error every ten seconds.

    ``total``: frames of the walk, None without end.
    """

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._began = self._said_at = clock()
        self._count = 0
        self._bar = tqdm(total=total, desc="waiting for the first frame", unit="frame", disable=None, **bar_size())

    def update(self) -> None:
        """One more frame."""
        if self._count == 0:
            self._bar.set_description("walking", refresh=False)
        self._count += 1
        self._bar.update()
        now = self._clock()
        if self._bar.disable and now - self._said_at >= _LINE_INTERVAL_S:
            self._said_at = now
            of_total = "" if self._total is None else f" of {self._total}"
            rate = self._count / (now - self._began)
            note(f"{self._count}{of_total} frames, {rate:.1f} frames/s")

    def close(self) -> None:
        self._bar.close()


class Walk:
    """Saves and counts the frames of one walk, measures it and shows its progress.

    At the end, also at an early one, it prints how fast the walk was and where its frames are.
    """

    def __init__(self, out: str | None, fps: float, *, overwrite: bool) -> None:
        self._writer = open_writer(out, fps, overwrite=overwrite)
        self._progress: WalkProgress | None = None
        self._stats: Sequence[ChunkStats] = ()
        self.metrics = WalkMetrics()

    def begin(self, total: int | None, stats: Sequence[ChunkStats]) -> None:
        """Time counts from here. ``total``: frames, None without end. ``stats`` grows with the walk."""
        self.metrics = WalkMetrics()
        self._stats = stats
        self._progress = WalkProgress(total)

    def add(self, pixels: npt.NDArray[np.uint8], chunk_index: int, event_id: int | None = None) -> None:
        """Takes one pixel frame uint8 [H, W, 3]. Raises OutputFailed if it cannot be saved."""
        assert self._progress is not None
        self.metrics.frame_received(chunk_index, event_id)
        self._write(pixels)
        self._progress.update()

    def __enter__(self) -> Walk:
        self._write = self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.close()
        self._writer.__exit__(*error)
        if self.metrics.frames or error[0] is None:
            say(self.metrics.summary(self._stats))
        if self._write.result:
            say(self._write.result)


class WalkMetrics:
    """Counts frames and measures times. Time starts at construction: make one when the session begins."""

    def __init__(self) -> None:
        self.frames = 0
        self._started = time.monotonic()
        self._first_at = self._last_at = self._started
        self._steady_from = self._started  # arrival of chunk 0's last frame
        self._steady_frames = 0
        self._unanswered: dict[int, float] = {}  # event id -> when it was sent
        self._latencies_ms: list[float] = []

    def event_sent(self, event_id: int) -> None:
        self._unanswered[event_id] = time.monotonic()

    def frame_received(self, chunk_index: int, event_id: int | None) -> None:
        now = self._last_at = time.monotonic()
        if self.frames == 0:
            self._first_at = now
        self.frames += 1
        if chunk_index == 0:
            self._steady_from = now
        else:
            self._steady_frames += 1
        if event_id is not None:
            for answered in [known for known in self._unanswered if known <= event_id]:
                self._latencies_ms.append(1000 * (now - self._unanswered.pop(answered)))

    def summary(self, stats: Sequence[ChunkStats]) -> str:
        """The text to print. ``stats``: the session's ChunkStats; the first chunk is left out if there are others."""
        if not self.frames:
            return "no frames received"
        lines = [f"{self.frames} frames in {len(stats)} chunk{'s' if len(stats) != 1 else ''}"]
        lines.append(f"  init to first frame  {self._first_at - self._started:.2f} s")
        if self._steady_frames:
            rate = self._steady_frames / max(self._last_at - self._steady_from, 1e-9)
            lines.append(f"  steady rate          {rate:.1f} frames/s")
        steady = list(stats)[1:] or list(stats)
        if steady:
            lines.append(f"  chunk                {p50_p95([chunk.chunk_total_ms for chunk in steady])}")
        timed = [chunk for chunk in steady if chunk.overhead_ms is not None]
        if timed:
            lines.append(f"  of which (medians)   {_parts(timed)}")
        if self._latencies_ms:
            lines.append(f"  key to frame         {p50_p95(self._latencies_ms)}, {len(self._latencies_ms)} key changes")
        return "\n".join(lines)


def _parts(chunks: Sequence[ChunkStats]) -> str:
    """The medians of DiT and VAE, and what is left of the median chunk. Says so when the parts do not add up."""
    total, dit, vae = (
        round(statistics.median([getattr(chunk, name) for chunk in chunks]))
        for name in ("chunk_total_ms", "dit_ms", "vae_ms")
    )
    overlaps = any(chunk.overlaps for chunk in chunks) or dit + vae > total
    parts = f"DiT {dit} ms, VAE {vae} ms, overhead {max(total - dit - vae, 0)} ms"
    return f"{parts}; they overlap with each other or with other chunks" if overlaps else parts


def p50_p95(values_ms: Sequence[float]) -> str:
    """Median and nearest-rank 95th percentile."""
    ordered = sorted(values_ms)
    p95 = ordered[min(round(0.95 * (len(ordered) - 1)), len(ordered) - 1)]
    return f"p50 {statistics.median(ordered):.0f} ms, p95 {p95:.0f} ms"
