"""Traces of sessions: by a tracer with the interface of OpenTelemetry's API, and by the SDK where it is installed."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError
from lingbot_rt.server.app import create_app
from lingbot_rt.telemetry import tracing
from lingbot_rt.telemetry.tracing import open_tracing
from tests.server.conftest import LIMIT_S, event, init, running, state
from tests.server.fake_engine import FakeEngine

trace = pytest.importorskip("opentelemetry.trace")


@dataclass
class Seen:
    """A finished span."""

    name: str
    parent: str | None
    begin: int  # ns
    end: int
    attributes: dict[str, Any]
    is_error: bool


class StubSpan(trace.NonRecordingSpan):
    def __init__(self, number: int, seen: Seen, done: list[Seen]) -> None:
        super().__init__(trace.SpanContext(1, number, False, trace.TraceFlags(trace.TraceFlags.SAMPLED)))
        self.seen, self._done = seen, done

    def set_attributes(self, attributes) -> None:
        self.seen.attributes.update(attributes)

    def set_status(self, status, description=None) -> None:
        self.seen.is_error = status is trace.StatusCode.ERROR

    def end(self, end_time=None) -> None:
        self.seen.end = end_time
        self._done.append(self.seen)


class StubTracer:
    def __init__(self) -> None:
        self.done: list[Seen] = []
        self._started = 0

    def start_span(self, name, context=None, *, attributes=None, start_time=None) -> StubSpan:
        self._started += 1
        parent = trace.get_current_span(context)
        above = parent.seen.name if isinstance(parent, StubSpan) else None
        return StubSpan(self._started, Seen(name, above, start_time, 0, dict(attributes or {}), False), self.done)


class SdkTracer:
    """The SDK's tracer with its exporter in memory."""

    def __init__(self) -> None:
        sdk = pytest.importorskip("opentelemetry.sdk.trace")
        export = pytest.importorskip("opentelemetry.sdk.trace.export")
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        self._exporter = memory.InMemorySpanExporter()
        provider = sdk.TracerProvider()
        provider.add_span_processor(export.SimpleSpanProcessor(self._exporter))
        self.start_span = provider.get_tracer("test").start_span

    @property
    def done(self) -> list[Seen]:
        spans = self._exporter.get_finished_spans()
        names = {span.context.span_id: span.name for span in spans}
        assert len({span.context.trace_id for span in spans}) == sum(span.parent is None for span in spans)
        return [
            Seen(
                span.name,
                None if span.parent is None else names[span.parent.span_id],
                span.start_time,
                span.end_time,
                dict(span.attributes),
                not span.status.is_ok and not span.status.is_unset,
            )
            for span in spans
        ]


@pytest.fixture(params=[StubTracer, SdkTracer])
def tracer(request):
    return request.param()


async def play(tracer, engine: FakeEngine, *messages) -> list[Seen]:
    async with running(engine) as server:
        server.service.tracer = tracer
        async with server.client(*messages) as client:
            await client.closed()
        await server.idle()
    return tracer.done


async def test_a_session_is_one_trace(tracer):
    """Picture, queue, open, and a span per chunk with the engine's stages, in order, all within the session."""
    spans = await play(tracer, FakeEngine(), init(max_chunks=2), event("camera_actions", state("w"), 1))
    (root,) = (span for span in spans if span.parent is None)
    assert (root.name, root.is_error) == ("session", False)
    assert root.attributes["lingbot.ending"] == "complete"
    assert (root.attributes["lingbot.chunks"], root.attributes["lingbot.frames"]) == (2, 21)
    within = [span for span in spans if span.parent == "session"]
    assert [span.name for span in within] == ["picture", "queue", "open", "chunk", "chunk"]
    assert [span.attributes["lingbot.frames"] for span in within[3:]] == [9, 12]
    assert sum("lingbot.event_latency_ms" in span.attributes for span in within) == 1
    assert all(root.begin <= span.begin <= span.end for span in within)
    assert within[0].end == within[1].begin
    stages = [span for span in spans if span.parent == "chunk"]
    assert [span.name for span in stages] == ["prepare", "denoise", "decode", "context"] * 2
    for first in (0, 4):
        four, chunk = stages[first : first + 4], within[3 + first // 4]
        assert all(before.end == after.begin for before, after in pairwise(four))
        assert chunk.begin <= four[0].begin
        assert four[3].end <= chunk.end
    known = {"session_id", "size", "ending", "chunks", "frames", "chunk_index", "sent_bytes", "window_frames"}
    known |= {"encode_ms", "send_ms", "pace_wait_ms", "event_latency_ms"}
    assert {name for span in spans for name in span.attributes} == {f"lingbot.{name}" for name in known}


async def test_a_session_that_breaks_is_an_error(tracer):
    spans = await play(tracer, FakeEngine(fail_at_chunk=1), init())
    (root,) = (span for span in spans if span.parent is None)
    assert root.is_error
    assert root.attributes["lingbot.ending"] == "engine_failed"
    assert root.attributes["lingbot.chunks"] == 1


async def test_a_session_that_does_not_fit_is_a_trace_of_its_own():
    """A refused init ends its trace; the next init of the same client begins another."""
    tracer = StubTracer()
    engine = FakeEngine(max_open_pixels=64 * 64)
    async with running(engine) as server:
        server.service.tracer = tracer
        async with server.client(init(size="128x64")) as client:
            assert (await client.error())["code"] == "capacity"
            await client.send(init(max_chunks=1))
            await client.closed()
        await server.idle()
    roots = [span for span in tracer.done if span.parent is None]
    assert [root.attributes["lingbot.ending"] for root in roots] == ["capacity", "complete"]


async def test_a_trace_has_a_bounded_number_of_chunks(monkeypatch):
    monkeypatch.setattr(tracing, "MAX_CHUNK_SPANS", 2)
    spans = await play(StubTracer(), FakeEngine(), init(max_chunks=3))
    assert sum(span.name == "chunk" for span in spans) == 2
    assert spans[-1].attributes["lingbot.chunks"] == 3


def test_nothing_is_imported_when_it_is_off():
    """Without --trace-endpoint neither the API nor the SDK is loaded by the server's code."""
    code = (
        "import sys; from lingbot_rt.telemetry.tracing import open_tracing; import lingbot_rt.telemetry.session; "
        "assert open_tracing(None) is None; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert create_app(ServeConfig(), FakeEngine()).state.service.tracer is None


@pytest.mark.parametrize("endpoint", ["collector", "grpc://host:4317", "http://", "http://host:99999", "http://[::1"])
def test_a_wrong_endpoint_is_named(endpoint):
    with pytest.raises(ConfigError, match=r"--trace-endpoint .*expected the URL of an OTLP collector") as wrong:
        create_app(ServeConfig(trace_endpoint=endpoint), FakeEngine())
    assert wrong.value.field == "trace_endpoint"


def test_a_missing_package_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'lingbot-rt\[tracing\]'"):
        open_tracing("http://127.0.0.1:4318")


def test_a_collector_that_does_not_answer_delays_no_shutdown(monkeypatch):
    """``close`` returns while the last export hangs."""
    monkeypatch.setattr(tracing, "CLOSE_LIMIT_S", 0.01)
    gate = threading.Event()

    class Provider:
        def shutdown(self) -> None:
            gate.wait(LIMIT_S)

    tracing.Tracing(StubTracer(), Provider()).close()
    assert not gate.is_set()
    gate.set()


def test_spans_reach_a_collector(monkeypatch):
    """With the SDK installed a POST of spans arrives at /v1/traces of the endpoint."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    arrived: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            opened = open_tracing(f"http://127.0.0.1:{collector.server_port}")
            opened.tracer.start_span("session", None).end()
            opened.close()
        finally:
            collector.shutdown()
            thread.join()
    assert [path for path, _ in arrived] == ["/v1/traces"]
    assert b"lingbot-rt" in arrived[0][1]
