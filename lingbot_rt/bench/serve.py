"""A served stream as a player has it: a real client on a real socket, keys pressed on the way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lingbot_rt.bench.figures import Spread, number, spread_of, table
from lingbot_rt.bench.playback import Arrival, Playback, event_latencies_ms, jitter_ms, play
from lingbot_rt.client import ChunkStats, ConnectFailed, Session, SessionLost, connect
from lingbot_rt.client.served import served_model

_FACTS = ("id", "device", "dtype", "num_ranks")
_HELD = (("w",), ("w", "l"), ("w",), ("w", "j"))
_IRREGULAR = (0.6, 1.4)  # times the interval: presses that keep step with the chunks would all wait equally long


@dataclass(frozen=True, slots=True)
class Visit:
    """One session to be measured."""

    url: str
    api_key: str | None
    init: Mapping[str, Any]  # arguments of ``client.connect``, max_chunks among them
    press_every_s: float  # mean time between key changes
    playback_fps: float  # of the player whose underruns are counted
    playback_lead_s: float  # how long that player waits after the first frame


@dataclass(frozen=True, slots=True)
class ServeReport:
    url: str
    model: Mapping[str, Any]  # of the server's entry in /v1/models
    init: Mapping[str, Any]
    frames: int
    chunks: int
    first_frame_s: float  # from opening the socket until the first picture is decoded
    frames_per_s: float | None  # from the end of chunk 0 on
    server_ms: dict[str, Spread]  # chunk_stats, from chunk 1 on
    chunk_interval_ms: Spread | None  # between the last frames of neighbouring chunks, at the client
    event_to_frame_ms: Spread | None  # from sending a key change to the first frame that carries it
    events: int
    jitter_ms: float | None  # standard deviation of a frame's arrival about its place in a steady stream
    playback: Playback


@dataclass(slots=True)
class Seen:
    """What one visit saw, in seconds of the monotonic clock."""

    began: float
    frames: list[Arrival] = field(default_factory=list)
    pressed: list[tuple[int, float]] = field(default_factory=list)  # event id, when it was sent
    stats: list[ChunkStats] = field(default_factory=list)


def visit(plan: Visit, done: Callable[[], object]) -> Seen:
    """Walks through the world until ``max_chunks``; ``done`` is called after each frame. Raises ClientError."""
    seen = Seen(began=time.monotonic())
    with connect(plan.url, api_key=plan.api_key, **plan.init) as world:
        over = threading.Event()
        keys = threading.Thread(target=_press, args=(world, plan.press_every_s, seen, over), name="keys")
        keys.start()
        try:
            for frame in world:
                seen.frames.append(Arrival(time.monotonic(), frame.chunk_index, frame.event_id))
                done()
        finally:
            over.set()
            keys.join()
        seen.stats = list(world.stats)
    if not seen.frames:
        raise SessionLost("the session ended before its first frame")
    return seen


def model_facts(url: str, api_key: str | None) -> dict[str, Any]:
    """What the server's /v1/models says of its model and device; nothing where it does not say."""
    try:
        entry = served_model(url, api_key)
    except ConnectFailed:
        return {}
    return {name: entry[name] for name in _FACTS if name in entry}


def serve_report(plan: Visit, model: Mapping[str, Any], seen: Seen) -> ServeReport:
    times = [frame.at for frame in seen.frames]
    first_chunk = [frame.at for frame in seen.frames if frame.chunk_index == seen.frames[0].chunk_index]
    steady = times[len(first_chunk) :]
    ends = list({frame.chunk_index: frame.at for frame in seen.frames}.values())
    rate = len(steady) / (steady[-1] - first_chunk[-1]) if steady else None
    events = event_latencies_ms(seen.frames, seen.pressed)
    return ServeReport(
        url=plan.url,
        model=model,
        init={name: value for name, value in plan.init.items() if name != "first_frame"},
        frames=len(times),
        chunks=len(ends),
        first_frame_s=times[0] - seen.began,
        frames_per_s=rate,
        server_ms=_server_ms(seen.stats),
        chunk_interval_ms=spread_of([1000 * (after - before) for before, after in pairwise(ends)]),
        event_to_frame_ms=spread_of(events),
        events=len(events),
        jitter_ms=jitter_ms(steady),
        playback=play(times, plan.playback_fps, plan.playback_lead_s),
    )


def as_text(report: ServeReport) -> str:
    rows = [
        [name, number(ms.p50), number(ms.p95), number(ms.p99), str(ms.count)]
        for name, ms in (
            *((f"server: {name}", ms) for name, ms in report.server_ms.items()),
            ("client: chunk to chunk", report.chunk_interval_ms),
            ("client: key to frame", report.event_to_frame_ms),
        )
        if ms is not None
    ]
    playback = report.playback
    of = ", ".join(str(value) for value in report.model.values())
    return "\n".join(
        [
            f"{report.url}{': ' if of else ''}{of}",
            f"{report.frames} frames in {report.chunks} chunks; first frame after {report.first_frame_s:.2f} s, "
            f"then {number(report.frames_per_s)} frames/s",
            "",
            table(("ms", "p50", "p95", "p99", "of"), rows),
            "",
            f"arrival jitter {number(report.jitter_ms)} ms",
            f"a player at {playback.fps:g} frames/s, {playback.lead_s:g} s behind: {playback.underruns} underruns, "
            f"{playback.held_s:.2f} s held; none from {playback.smooth_lead_s:.2f} s behind on",
        ]
    )


def _server_ms(stats: list[ChunkStats]) -> dict[str, Spread]:
    """The first chunk counts only where there is no other."""
    steady = stats[1:] or stats
    told = {
        "chunk": [chunk.chunk_total_ms for chunk in steady],
        "DiT": [chunk.dit_ms for chunk in steady if chunk.dit_ms is not None],
        "VAE": [chunk.vae_ms for chunk in steady if chunk.vae_ms is not None],
        "encode": [chunk.encode_ms for chunk in steady if chunk.encode_ms is not None],
        "overhead": [chunk.overhead_ms for chunk in steady if chunk.overhead_ms is not None],
    }
    return {name: Spread.of(values) for name, values in told.items() if values}


def _press(world: Session, every_s: float, seen: Seen, over: threading.Event) -> None:
    """Another change of keys every so often, until ``over``."""
    chance = random.Random(0)
    changes = 0
    while not over.wait(every_s * chance.uniform(*_IRREGULAR)):
        sent = time.monotonic()
        try:
            seen.pressed.append((world.hold(*_HELD[changes % len(_HELD)]), sent))
        except SessionLost:
            return  # the reader of the frames hears of it too, and says so
        changes += 1
