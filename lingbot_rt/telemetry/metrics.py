"""The server's Prometheus metrics. docs/operations.md has their table.

A label has few values, and a client cannot make new ones: no session, prompt or address is one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from lingbot_rt import __version__
from lingbot_rt.session.plan import ChunkTimings, ModelInfo
from lingbot_rt.session.server_messages import ChunkStats

SESSION_STATES = ("waiting", "opening", "playing", "paused", "parked")
RESUME_SOURCES = ("memory", "snapshot", "file")
"""Where a session was that goes on: parked whole, kept as a snapshot, or with its client."""

STAGES = ("prepare", "recache", "denoise", "context", "decode", "postprocess", "encode", "send")
"""Of a chunk, in the order in which its frames pass through them."""

_MS_BUCKETS = (5, 10, 20, 50, 100, 200, 350, 500, 750, 1000, 1500, 2500, 5000, 10000)
_LONG_MS_BUCKETS = (10, 100, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000, 600000, 1800000)
_FACTOR_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)


class Metrics:
    """The metrics in their own registry. Gauges named ``show_...`` are set when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.ready = self._gauge("ready", "1 when the engine is ready for sessions")
        self.connections = self._gauge("connections", "open WebSockets")
        self.sessions = self._counter("sessions", "sessions opened")
        self.resumes = self._counter("session_resumes", "sessions that went on", "source")
        self.session_ends = self._counter("session_ends", "sessions that ended after they opened", "reason")
        self.ends = self._counter("connection_ends", "closed WebSockets", "code")
        self.errors = self._counter("errors", "error messages sent", "code")
        self.chunks = self._counter("chunks", "chunks sent")
        self.frames = self._counter("frames", "pixel frames sent")
        self.sent_bytes = self._counter("sent_bytes", "bytes of frame batches sent")
        self.queue_ms = self._histogram("queue_ms", "time in line of clients whose turn came", _LONG_MS_BUCKETS)
        self.open_ms = self._histogram("open_ms", "from a session's turn until the engine opened it", _LONG_MS_BUCKETS)
        self.chunk_ms = self._histogram("chunk_ms", "wall time per chunk")
        self.event_latency_ms = self._histogram(
            "event_latency_ms", "from receiving an event to sending the first frame that carries it"
        )
        self.realtime_factor = self._histogram(
            "realtime_factor", "playing time of a chunk's frames over the engine's time for it", _FACTOR_BUCKETS
        )
        self._stage_ms = self._histogram("stage_ms", "time per chunk and stage", _MS_BUCKETS, "stage")
        self._rank_ms = self._gauge("rank_ms", "newest chunk per rank, without waits for other ranks", "rank")
        self._live_sessions = self._gauge("live_sessions", "sessions of open WebSockets, and parked ones", "state")
        self.parked_bytes = self._gauge("parked_bytes", "host memory of parked sessions")
        self._outbox_bytes = self._gauge("outbox_bytes", "bytes of messages that sockets have not taken yet")
        self._memory_bytes = self._gauge("device_memory_bytes", "memory of rank 0's device by what holds it", "part")
        self._model_info = self._gauge("model_info", "1, for the loaded model", "model", "device", "dtype")
        build = self._gauge("build_info", "1, for the running build", "version", "python", "torch")
        build.labels(__version__, platform.python_version(), _torch_version()).set(1)
        for state in SESSION_STATES:
            self._live_sessions.labels(state)
        for stage in STAGES:
            self._stage_ms.labels(stage)
        for source in RESUME_SOURCES:
            self.resumes.labels(source)
        for reason in ("complete", "client_gone", "client_too_slow", "engine_failed", "not_resumed"):
            self.session_ends.labels(reason)  # a rate needs the zero before the first one

    def count_chunk(self, stats: ChunkStats, timings: ChunkTimings, playback_fps: float) -> None:
        """One chunk was sent. ``playback_fps``: frames/s at which its frames are to be shown."""
        self.chunks.inc()
        self.frames.inc(stats.num_frames)
        self.sent_bytes.inc(stats.ws_payload_bytes)
        self.chunk_ms.observe(stats.chunk_total_ms)
        for stage, ms in stage_times(stats, timings).items():
            self._stage_ms.labels(stage).observe(ms)
        if timings.total_ms > 0:
            self.realtime_factor.observe(1000 * stats.num_frames / playback_fps / timings.total_ms)
        if stats.event_latency_ms is not None:
            self.event_latency_ms.observe(stats.event_latency_ms)
        for rank, ms in enumerate(timings.ranks_ms):
            self._rank_ms.labels(str(rank)).set(ms)

    def show_sessions(self, states: Iterable[str | None]) -> None:
        """``states``: that of each connection, None without a session, and that of each parked session."""
        counts = dict.fromkeys(SESSION_STATES, 0)
        for state in states:
            if state is not None:
                counts[state] += 1
        for state, count in counts.items():
            self._live_sessions.labels(state).set(count)

    def show_memory(self, outbox_bytes: int, device_bytes: Mapping[str, int]) -> None:
        """``device_bytes``: of the device, by part; empty if it cannot tell."""
        self._outbox_bytes.set(outbox_bytes)
        for part, count in device_bytes.items():
            self._memory_bytes.labels(part).set(count)

    def show_model(self, info: ModelInfo) -> None:
        self._model_info.labels(info.model_id, info.device, info.dtype).set(1)

    def exposition(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"lingbot_rt_{name}", meaning, labels, registry=self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"lingbot_rt_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...] = _MS_BUCKETS, *labels: str) -> Histogram:
        return Histogram(f"lingbot_rt_{name}", meaning, labels, buckets=buckets, registry=self.registry)


def stage_times(stats: ChunkStats, timings: ChunkTimings) -> dict[str, float]:
    """Milliseconds of each of ``STAGES`` that the chunk went through."""
    times = {
        "prepare": timings.prepare_ms,
        "recache": timings.stages.get("recache"),
        "denoise": timings.stages.get("denoise", timings.dit_ms),
        "context": timings.stages.get("context"),
        "decode": timings.vae_ms,
        "postprocess": sum(timings.postprocess.values()) if timings.postprocess else None,
        "encode": stats.raw_payload_build_ms,
        "send": stats.header_write_ms + stats.raw_write_ms,
    }
    return {stage: ms for stage, ms in times.items() if ms is not None}


def _torch_version() -> str:
    """As installed: torch is not imported for it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
