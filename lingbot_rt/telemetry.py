"""The log on stderr and the Prometheus metrics. No torch."""

from __future__ import annotations

import logging
import re
from urllib.parse import quote, quote_plus, unquote_plus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lingbot_rt.session.messages import ChunkStats

_MS_BUCKETS = (5, 10, 20, 50, 100, 200, 350, 500, 750, 1000, 1500, 2500, 5000, 10000)


_PARAMETER = re.compile(r"([?&;])([^\s=&;?\"']+)=([^\s&;\"']*)")
_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|(?:x-)?api[-_]key)(:\s*)[^\r\n]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s'\",;)]+")
_HIDDEN = "***"


class HideKeys(logging.Filter):
    """Replaces keys in log records by ``***``, in messages and tracebacks: the server's own key wherever it stands, and
    whatever a client sends as a key.

    Clients send keys in the query (``?api_key=KEY``) and in headers, which the WebSocket library logs at debug level.
    """

    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        spellings = {key, quote(key, safe=""), quote_plus(key), repr(key)[1:-1]} if key else set()
        longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
        self._key = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)") if spellings else None

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        hidden = self.hide(message)
        if hidden != message:
            record.msg, record.args = hidden, None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self.hide(record.exc_text)
        return True

    def hide(self, text: str) -> str:
        """``text`` without keys."""
        text = _PARAMETER.sub(_hidden_parameter, text)
        text = _HEADER.sub(rf"\1\2{_HIDDEN}", text)
        text = _BEARER.sub(rf"\1{_HIDDEN}", text)
        return text if self._key is None else self._key.sub(_HIDDEN, text)


def _hidden_parameter(match: re.Match[str]) -> str:
    # Names may be percent-encoded too: the server reads api%5Fkey as api_key.
    is_key = unquote_plus(match[2]).strip().lower() == "api_key"
    return f"{match[1]}{match[2]}={_HIDDEN}" if is_key else match[0]


def configure_logging(level: str, *, key: str | None = None) -> None:
    """Logs to stderr what has at least ``level``: debug, info, warning or error. Replaces an earlier configuration.

    ``key``: the server's API key, which is hidden wherever it would be logged.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    handler.addFilter(HideKeys(key))
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
