"""The log on stderr and the Prometheus metrics. No torch."""

from __future__ import annotations

import logging
import re
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lingbot_rt.session.messages import ChunkStats

_SECRET = re.compile(r"(api_key=)[^&\s\"]+")
_MS_BUCKETS = (5, 10, 20, 50, 100, 200, 350, 500, 750, 1000, 1500, 2500, 5000, 10000)


class HideKeys(logging.Filter):
    """Replaces the key in ``?api_key=KEY`` of request lines by ``***``."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_hidden(value) for value in record.args)
        record.msg = _hidden(record.msg)
        return True


def _hidden(value: Any) -> Any:
    return _SECRET.sub(r"\1***", value) if isinstance(value, str) else value


def configure_logging(level: str) -> None:
    """Logs to stderr what has at least ``level``: debug, info, warning or error. Replaces an earlier configuration."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    handler.addFilter(HideKeys())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class Metrics:
    """The server's Prometheus metrics, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ready = Gauge("lingbot_rt_ready", "1 when the engine is ready for sessions", registry=self.registry)
        self.connections = Gauge("lingbot_rt_connections", "open WebSockets", registry=self.registry)
        self.active = Gauge("lingbot_rt_sessions_active", "sessions that run", registry=self.registry)
        self.waiting = Gauge("lingbot_rt_sessions_waiting", "clients that wait for a session", registry=self.registry)
        self.sessions = Counter("lingbot_rt_sessions", "sessions opened", registry=self.registry)
        self.ends = Counter("lingbot_rt_connection_ends", "closed WebSockets", ["code"], registry=self.registry)
        self.errors = Counter("lingbot_rt_errors", "error messages sent", ["code"], registry=self.registry)
        self.chunks = Counter("lingbot_rt_chunks", "chunks sent", registry=self.registry)
        self.frames = Counter("lingbot_rt_frames", "pixel frames sent", registry=self.registry)
        self.sent_bytes = Counter("lingbot_rt_sent_bytes", "bytes of frame batches sent", registry=self.registry)
        self.chunk_ms = Histogram(
            "lingbot_rt_chunk_ms", "wall time per chunk", buckets=_MS_BUCKETS, registry=self.registry
        )
        self.stage_ms = Histogram(
            "lingbot_rt_stage_ms", "time per chunk and stage", ["stage"], buckets=_MS_BUCKETS, registry=self.registry
        )
        self.rank_ms = Gauge(
            "lingbot_rt_rank_ms",
            "time of the newest chunk per rank, without waits for other ranks",
            ["rank"],
            registry=self.registry,
        )
        self.event_latency_ms = Histogram(
            "lingbot_rt_event_latency_ms",
            "from receiving an event to sending the first frame that carries it",
            buckets=_MS_BUCKETS,
            registry=self.registry,
        )

    def count_chunk(self, stats: ChunkStats, ranks_ms: tuple[float, ...]) -> None:
        """One chunk was sent."""
        self.chunks.inc()
        self.frames.inc(stats.num_frames)
        self.sent_bytes.inc(stats.ws_payload_bytes)
        self.chunk_ms.observe(stats.chunk_total_ms)
        for stage, ms in (("dit", stats.dit_ms), ("vae", stats.vae_ms), ("encode", stats.raw_payload_build_ms)):
            self.stage_ms.labels(stage).observe(ms)
        if stats.event_latency_ms is not None:
            self.event_latency_ms.observe(stats.event_latency_ms)
        for rank, ms in enumerate(ranks_ms):
            self.rank_ms.labels(str(rank)).set(ms)

    def exposition(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
