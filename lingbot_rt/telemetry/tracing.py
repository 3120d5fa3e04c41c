"""OpenTelemetry traces: one per session, with a span per chunk and its stages. Nothing is imported unless it is on.

Spans are made when their work is over, with the times that were measured anyway: a running chunk pays nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from lingbot_rt import __version__
from lingbot_rt.config_values import environment_value
from lingbot_rt.errors import ConfigError, quoted
from lingbot_rt.session.session import Chunk

MAX_CHUNK_SPANS = 2000
"""Chunks of one session that have spans: a trace is kept in memory by whoever shows it."""

EXPORT_TIMEOUT_S = 2
"""Of one export, its repetitions included."""

CLOSE_LIMIT_S = 1.0
"""How long the last export may hold up a shutdown."""

_ENGINE_STAGES = ("prepare", "recache", "denoise", "decode", "context")
"""In the order in which the engine runs them, one after the other."""

_GOOD_ENDINGS = ("complete", "client_gone", "shutting_down")


class Tracer(Protocol):
    """Of OpenTelemetry's ``Tracer``, what is used here."""

    def start_span(
        self,
        name: str,
        context: Any = None,
        *,
        attributes: Any = None,
        start_time: int | None = None,
    ) -> Any: ...


@dataclass(frozen=True)
class Tracing:
    """A tracer, and the provider behind it that has to be shut down."""

    tracer: Tracer
    provider: Any

    def close(self) -> None:
        """Sends what has not been sent, for at most CLOSE_LIMIT_S: a collector may not answer."""
        closing = threading.Thread(target=self.provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_LIMIT_S)


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Traces to the OTLP collector at ``endpoint`` (HTTP); None without one.

    OpenTelemetry's own variables hold for everything else, such as ``OTEL_TRACES_SAMPLER`` and
    ``OTEL_EXPORTER_OTLP_HEADERS``. Raises ConfigError.
    """
    if endpoint is None:
        return None
    url = _traces_url(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"--trace-endpoint needs OpenTelemetry: pip install 'lingbot-rt[tracing]' (no {error.name})",
            field="trace_endpoint",
        ) from None
    attributes = {"service.version": __version__}
    if environment_value("OTEL_SERVICE_NAME") is None:
        attributes["service.name"] = "lingbot-rt"
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)))
    return Tracing(provider.get_tracer("lingbot_rt", __version__), provider)


def _traces_url(endpoint: str) -> str:
    """``http://host:4318`` -> the URL below which collectors take traces. A URL with a path is taken as it is."""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(
            f"--trace-endpoint {quoted(endpoint)}: expected the URL of an OTLP collector, such as http://127.0.0.1:4318",
            field="trace_endpoint",
        )
    return endpoint if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"


class SessionTrace:
    """The trace of one session. Times are seconds of the monotonic clock."""

    def __init__(self, tracer: Tracer, session_id: str, size: str, begun_at: float) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        self._in_context = set_span_in_context
        self._tracer = tracer
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        attributes = {"lingbot.session_id": session_id, "lingbot.size": size}
        self._root: Any = tracer.start_span("session", Context(), attributes=attributes, start_time=self._ns(begun_at))
        self._within_root = set_span_in_context(self._root)
        self._chunk_spans = 0

    def phase(self, name: str, begun_at: float, ended_at: float) -> None:
        """What comes before the first chunk, or between two: picture, queue, open, parked."""
        self._span(name, self._within_root, begun_at, ended_at)

    def chunk(self, chunk: Chunk, stages_ms: Mapping[str, float]) -> None:
        """A chunk that was sent. The engine's stages are spans; encoding and sending go on beside them."""
        if self._chunk_spans >= MAX_CHUNK_SPANS:
            return
        self._chunk_spans += 1
        stats = chunk.stats
        attributes = {
            "lingbot.chunk_index": stats.chunk_index,
            "lingbot.frames": stats.num_frames,
            "lingbot.sent_bytes": stats.ws_payload_bytes,
            "lingbot.window_frames": stats.window_frames,
            "lingbot.encode_ms": stages_ms["encode"],
            "lingbot.send_ms": stages_ms["send"],
            "lingbot.pace_wait_ms": stats.pace_wait_ms,
        }
        if stats.event_latency_ms is not None:
            attributes["lingbot.event_latency_ms"] = stats.event_latency_ms
        at = chunk.begun_at + stats.request_prepare_ms / 1000
        spans = []
        for stage in (stage for stage in _ENGINE_STAGES if stage in stages_ms):
            # Upscaling and interpolation go on during the decode.
            ms = stages_ms[stage] + (stages_ms.get("postprocess", 0.0) if stage == "decode" else 0.0)
            spans.append((stage, at, at + ms / 1000))
            at += ms / 1000
        within = self._span("chunk", self._within_root, chunk.begun_at, max(chunk.sent_at, at), attributes)
        for stage, begun_at, ended_at in spans:
            self._span(stage, within, begun_at, ended_at)

    def end(self, ending: str, chunks: int, frames: int, now: float) -> None:
        from opentelemetry.trace import StatusCode

        self._root.set_attributes({"lingbot.ending": ending, "lingbot.chunks": chunks, "lingbot.frames": frames})
        if ending not in _GOOD_ENDINGS:
            self._root.set_status(StatusCode.ERROR, ending)
        self._root.end(end_time=self._ns(now))

    def _span(self, name: str, context: Any, begun_at: float, ended_at: float, attributes: Any = None) -> Any:
        """The context for spans within it."""
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=self._ns(begun_at))
        span.end(end_time=self._ns(ended_at))
        return self._in_context(span)

    def _ns(self, seconds: float) -> int:
        """Nanoseconds since 1970."""
        return int(seconds * 1e9) + self._offset_ns
