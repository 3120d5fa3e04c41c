"""One session for metrics, log and trace, from its init to its end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from lingbot_rt.session.plan import ChunkResult
from lingbot_rt.session.session import Chunk, Session
from lingbot_rt.telemetry.metrics import Metrics, stage_times
from lingbot_rt.telemetry.tracing import SessionTrace, Tracer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SessionFigures:
    """What the last line of a session says, in units of its names."""

    chunks: int = 0
    frames: int = 0
    sent_bytes: int = 0
    queue_ms: float = 0.0
    open_ms: float = 0.0
    playing_s: float = 0.0  # from the end of the opening
    frames_per_s: float = 0.0  # over playing_s, pauses included
    longest_chunk_ms: float = 0.0
    events: int = 0  # whose latency was measured
    event_latency_ms: float | None = None  # mean
    longest_event_latency_ms: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)  # mean per chunk

    def as_dict(self) -> dict[str, Any]:
        """With three digits behind the point."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        values["stages_ms"] = {name: round(ms, 3) for name, ms in self.stages_ms.items()}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


class SessionTelemetry:
    """Hears of everything that happens to a session. Times are seconds of the monotonic clock."""

    def __init__(self, session: Session, metrics: Metrics, tracer: Tracer | None, begun_at: float) -> None:
        self.figures = SessionFigures()
        self._session = session
        self._metrics = metrics
        self._phase_at = begun_at
        self._opened_at: float | None = None
        settings = session.settings
        self._trace = None if tracer is None else SessionTrace(tracer, session.id, str(settings.size), begun_at)

    def has_picture(self, now: float) -> None:
        """The first frame is decoded: from here on the client waits for its turn."""
        self._phase("picture", now)

    def has_slot(self, now: float) -> None:
        """Its turn came."""
        self.figures.queue_ms = self._phase("queue", now)
        self._metrics.queue_ms.observe(self.figures.queue_ms)

    def opened(self, now: float) -> None:
        """The engine has opened it."""
        self.figures.open_ms = self._phase("open", now)
        self._opened_at = now
        self._metrics.open_ms.observe(self.figures.open_ms)
        self._metrics.sessions.inc()
        settings = self._session.settings
        log.info("session %s: %s, %d latent frames", self._session.id, settings.size, settings.latent_frames)

    def parked(self, now: float) -> None:
        """Its client's line is lost."""
        self._phase_at = now

    def came_back(self, now: float) -> None:
        """Its client is there again: from here on it waits for its turn."""
        self._phase("parked", now)

    def resumed(self, source: str, now: float) -> None:
        """It goes on. ``source``: one of ``metrics.RESUME_SOURCES``."""
        self._phase("open", now)
        self._metrics.resumes.labels(source).inc()
        log.info("session %s goes on, from %s", self._session.id, source)

    def sent(self, chunk: Chunk, result: ChunkResult) -> None:
        """All frames of a chunk and its statistics have left."""
        stats, figures = chunk.stats, self.figures
        self._metrics.count_chunk(stats, result.timings, self._session.settings.playback_fps)
        figures.chunks += 1
        figures.frames += stats.num_frames
        figures.sent_bytes += stats.ws_payload_bytes
        figures.longest_chunk_ms = max(figures.longest_chunk_ms, stats.chunk_total_ms)
        stages = stage_times(stats, result.timings)
        for stage, ms in stages.items():
            mean = figures.stages_ms.get(stage, 0.0)
            figures.stages_ms[stage] = mean + (ms - mean) / figures.chunks
        if stats.event_latency_ms is not None:
            figures.events += 1
            mean = figures.event_latency_ms or 0.0
            figures.event_latency_ms = mean + (stats.event_latency_ms - mean) / figures.events
            figures.longest_event_latency_ms = max(figures.longest_event_latency_ms or 0.0, stats.event_latency_ms)
        if self._trace is not None:
            self._trace.chunk(chunk, stages)

    def ended(self, ending: str, now: float) -> None:
        """``ending``: one word for why. A session that never opened is no session for metrics and log."""
        figures = self.figures
        if self._opened_at is not None:
            figures.playing_s = now - self._opened_at
            figures.frames_per_s = figures.frames / figures.playing_s if figures.playing_s > 0 else 0.0
            self._metrics.session_ends.labels(ending).inc()
            latency = (
                f"key to frame {figures.event_latency_ms:.0f} ms mean, {figures.longest_event_latency_ms:.0f} ms most"
                if figures.event_latency_ms is not None
                else "no keys"
            )
            log.info(
                "session %s ended: %s after %.1f s; %d chunks, %d frames, %.1f frames/s, %.2f MB; longest chunk %.0f "
                "ms; %s; in line %.1f s",
                self._session.id,
                ending,
                figures.playing_s,
                figures.chunks,
                figures.frames,
                figures.frames_per_s,
                figures.sent_bytes / 1e6,
                figures.longest_chunk_ms,
                latency,
                figures.queue_ms / 1000,
                extra={"figures": {"ending": ending, "size": str(self._session.settings.size)} | figures.as_dict()},
            )
        if self._trace is not None:
            self._trace.end(ending, figures.chunks, figures.frames, now)

    def _phase(self, name: str, now: float) -> float:
        """What began with the phase before has ended; how long it took, in ms."""
        begun_at, self._phase_at = self._phase_at, now
        if self._trace is not None:
            self._trace.phase(name, begun_at, now)
        return 1000 * (now - begun_at)
