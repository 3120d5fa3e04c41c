"""Measures a served stream with a real client on a real socket that presses keys during the session."""

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
from lingbot_rt.client.server_info import fetch_model_info

_MODEL_FIELDS = ("id", "device", "dtype", "num_ranks")
_KEY_SEQUENCE = (("w",), ("w", "l"), ("w",), ("w", "j"))
_INTERVAL_RANGE = (0.6, 1.4)  # times the mean interval; even presses would all hit the same phase of a chunk


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """One session to measure."""

    url: str
    api_key: str | None
    init: Mapping[str, Any]  # arguments of ``client.connect``, max_chunks among them
    press_every_s: float  # mean time between key changes
    playback_fps: float  # frame rate of the simulated player
    playback_lead_s: float  # how long that player waits after the first frame


@dataclass(frozen=True, slots=True)
class ServeReport:
    url: str
    model: Mapping[str, Any]  # some fields of the model's entry in /v1/models
    init: Mapping[str, Any]
    frames: int
    chunks: int
    first_frame_s: float  # from opening the socket until the first frame is decoded
    frames_per_s: float | None  # from the end of chunk 0 on
    server_ms: dict[str, Spread]  # chunk_stats, from chunk 1 on
    chunk_interval_ms: Spread | None  # between the last frames of neighbouring chunks, at the client
    event_to_frame_ms: Spread | None  # key-to-frame latency: from sending a key change to its first decoded frame
    events: int
    jitter_ms: float | None  # standard deviation of arrivals from an even stream
    playback: Playback


@dataclass(slots=True)
class Observations:
    """What the client saw, in seconds of the monotonic clock."""

    began: float
    frames: list[Arrival] = field(default_factory=list)
    pressed: list[tuple[int, float]] = field(default_factory=list)  # event id, when it was sent
    stats: list[ChunkStats] = field(default_factory=list)


def run_session(spec: SessionSpec, on_frame: Callable[[], object]) -> Observations:
    """Runs the session to its ``max_chunks``. Calls ``on_frame`` after each frame. Raises ClientError."""
    observed = Observations(began=time.monotonic())
    with connect(spec.url, api_key=spec.api_key, **spec.init) as session:
        ended = threading.Event()
        keys = threading.Thread(target=_press_keys, args=(session, spec.press_every_s, observed, ended), name="keys")
        keys.start()
        try:
            for frame in session:
                observed.frames.append(Arrival(time.monotonic(), frame.chunk_index, frame.event_id))
                on_frame()
        finally:
            ended.set()
            keys.join()
        observed.stats = list(session.stats)
    if not observed.frames:
        raise SessionLost("the session ended before its first frame")
    return observed


def model_facts(url: str, api_key: str | None) -> dict[str, Any]:
    """Model and device as the server's /v1/models reports them; empty if it does not answer."""
    try:
        entry = fetch_model_info(url, api_key)
    except ConnectFailed:
        return {}
    return {name: entry[name] for name in _MODEL_FIELDS if name in entry}


def serve_report(spec: SessionSpec, model: Mapping[str, Any], observed: Observations) -> ServeReport:
    times = [frame.at for frame in observed.frames]
    first_chunk = [frame.at for frame in observed.frames if frame.chunk_index == observed.frames[0].chunk_index]
    steady = times[len(first_chunk) :]
    ends = list({frame.chunk_index: frame.at for frame in observed.frames}.values())
    rate = len(steady) / (steady[-1] - first_chunk[-1]) if steady else None
    events = event_latencies_ms(observed.frames, observed.pressed)
    return ServeReport(
        url=spec.url,
        model=model,
        init={name: value for name, value in spec.init.items() if name != "first_frame"},
        frames=len(times),
        chunks=len(ends),
        first_frame_s=times[0] - observed.began,
        frames_per_s=rate,
        server_ms=_server_ms(observed.stats),
        chunk_interval_ms=spread_of([1000 * (after - before) for before, after in pairwise(ends)]),
        event_to_frame_ms=spread_of(events),
        events=len(events),
        jitter_ms=jitter_ms(steady),
        playback=play(times, spec.playback_fps, spec.playback_lead_s),
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
    model = ", ".join(str(value) for value in report.model.values())
    return "\n".join(
        [
            f"{report.url}{': ' if model else ''}{model}",
            f"{report.frames} frames in {report.chunks} chunks; first frame after {report.first_frame_s:.2f} s, "
            f"then {number(report.frames_per_s)} frames/s",
            "",
            table(("ms", "p50", "p95", "p99", "count"), rows),
            "",
            f"arrival jitter {number(report.jitter_ms)} ms",
            f"playback at {playback.fps:g} frames/s, {playback.lead_s:g} s buffered: {playback.underruns} underruns, "
            f"{playback.held_s:.2f} s in all; no underruns from {playback.smooth_lead_s:.2f} s buffered",
        ]
    )


def _server_ms(stats: list[ChunkStats]) -> dict[str, Spread]:
    """Leaves out the first chunk if there are others."""
    steady = stats[1:] or stats
    values_ms = {
        "chunk": [chunk.chunk_total_ms for chunk in steady],
        "DiT": [chunk.dit_ms for chunk in steady if chunk.dit_ms is not None],
        "VAE": [chunk.vae_ms for chunk in steady if chunk.vae_ms is not None],
        "encode": [chunk.encode_ms for chunk in steady if chunk.encode_ms is not None],
        "overhead": [chunk.overhead_ms for chunk in steady if chunk.overhead_ms is not None],
    }
    return {name: Spread.of(values) for name, values in values_ms.items() if values}


def _press_keys(session: Session, every_s: float, observed: Observations, ended: threading.Event) -> None:
    """Changes the held keys every ``every_s`` seconds on average, until ``ended``."""
    random_ = random.Random(0)
    changes = 0
    while not ended.wait(every_s * random_.uniform(*_INTERVAL_RANGE)):
        sent = time.monotonic()
        try:
            observed.pressed.append((session.hold(*_KEY_SEQUENCE[changes % len(_KEY_SEQUENCE)]), sent))
        except SessionLost:
            return  # the thread that reads the frames raises it too
        changes += 1
