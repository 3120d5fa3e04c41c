"""What arrival times mean to someone who looks on: pure functions of seconds."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """A pixel frame at the client, decoded."""

    at: float  # seconds
    chunk_index: int
    event_id: int | None  # newest event whose effect is in it


@dataclass(frozen=True, slots=True)
class Playback:
    """A player that shows ``fps`` frames/s, never skips one, and holds the last picture when the next is not there."""

    fps: float
    lead_s: float
    underruns: int  # times it had to hold
    held_s: float  # in all
    smooth_lead_s: float  # the lead with which it would never have had to


def play(times: Sequence[float], fps: float, lead_s: float) -> Playback:
    """``times``: when each frame came. The player starts ``lead_s`` after the first; a hold delays all that follows."""
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
    """Standard deviation of the arrivals about a steady stream of the same mean rate; None of fewer than three.

    Frames that come in groups are jitter too: a player must hide it.
    """
    if len(times) < 3:
        return None
    interval, start = statistics.linear_regression(range(len(times)), times)
    return 1000 * statistics.pstdev(at - (start + interval * i) for i, at in enumerate(times))


def event_latencies_ms(frames: Sequence[Arrival], pressed: Sequence[tuple[int, float]]) -> list[float]:
    """From sending each event (id, when) to the first frame that carries it or a newer one; those that none carried
    are left out."""
    carried = [(frame.event_id, frame.at) for frame in frames if frame.event_id is not None]
    newest = [event_id for event_id, _ in carried]
    found = []
    for event_id, sent in pressed:
        first = bisect.bisect_left(newest, event_id)
        if first < len(carried):
            found.append(1000 * (carried[first][1] - sent))
    return found
