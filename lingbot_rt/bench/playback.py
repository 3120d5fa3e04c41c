"""Playback figures from frame arrival times: underruns, jitter, key-to-frame latency. Pure functions of seconds."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """The moment at which the client had one pixel frame decoded."""

    at: float  # seconds
    chunk_index: int
    event_id: int | None  # newest event whose effect is in this frame


@dataclass(frozen=True, slots=True)
class Playback:
    """A simulated video player: shows ``fps`` frames/s, skips none, and repeats the last one while the next is late."""

    fps: float
    lead_s: float
    underruns: int  # times the next frame was late
    held_s: float  # total time on repeated frames
    smooth_lead_s: float  # smallest lead without an underrun


def play(times: Sequence[float], fps: float, lead_s: float) -> Playback:
    """``times``: arrival of each frame. Playback starts ``lead_s`` after the first. An underrun delays later frames."""
    start = times[0] + lead_s
    clock, underruns, held = start, 0, 0.0
    for at in times[1:]:
        clock += 1 / fps
        if at > clock:
            underruns += 1
            held += at - clock
            clock = at
    smooth = max(at - times[0] - i / fps for i, at in enumerate(times))
    return Playback(fps=fps, lead_s=lead_s, underruns=underruns, held_s=held, smooth_lead_s=smooth)


def jitter_ms(times: Sequence[float]) -> float | None:
    """Standard deviation of the arrivals from a perfectly even stream (least squares); None for fewer than three.

    Frames that arrive in groups count as jitter: a player has to buffer them.
    """
    if len(times) < 3:
        return None
    interval, start = statistics.linear_regression(range(len(times)), times)
    return 1000 * statistics.pstdev(at - (start + interval * i) for i, at in enumerate(times))


def event_latencies_ms(frames: Sequence[Arrival], pressed: Sequence[tuple[int, float]]) -> list[float]:
    """Time from sending each event (id, when) to the first frame with that id or a newer one.

    Events without such a frame are left out.
    """
    carried = [(frame.event_id, frame.at) for frame in frames if frame.event_id is not None]
    newest = [event_id for event_id, _ in carried]
    latencies = []
    for event_id, sent in pressed:
        first = bisect.bisect_left(newest, event_id)
        if first < len(carried):
            latencies.append(1000 * (carried[first][1] - sent))
    return latencies
