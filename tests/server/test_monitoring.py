"""What an operator watches: the metrics a server serves, and the dashboard and alerts that query them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
import yaml

from lingbot_rt.server.connection import Connection
from lingbot_rt.session.plan import ChunkTimings
from lingbot_rt.session.server_messages import ChunkStats
from lingbot_rt.telemetry.metrics import SESSION_STATES, STAGES, Metrics, stage_times
from tests.server.conftest import event, init, running, state, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.promql import Served, WrongQuery
from tests.server.test_http import get

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "configs/grafana/lingbot-rt.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "configs/prometheus/lingbot-rt.rules.yml").read_text(encoding="utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]


async def exposition(server) -> str:
    return (await get(server, "/metrics")).text


@pytest.fixture
async def served(serve) -> Served:
    """The metrics after two sessions, a wrong event and a refused client."""
    server = await serve(session_wait_s=0)
    # A client that stops reading would notice the server's goodbye only after 10 s.
    events = event("camera_actions", state("w"), 1), event("dance")
    async with server.client(init(), *events, max_queue=None) as playing:
        await playing.chunk()
        async with server.client(init()) as refused:
            assert (await refused.closed())[0] == 1008
    await server.idle()
    async with server.client(init(max_chunks=1)) as client:
        await client.closed()
    await server.idle()
    return Served(await exposition(server))


async def test_every_query_of_the_dashboard_has_its_metrics(served):
    """Each query parses, its metrics, labels and values are served, and its legend has labels of the result."""
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    queried = ""
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            labels = served.check(target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, target
            queried += target["expr"]
    families = {family.name for family in Metrics().registry.collect()}
    unseen = {name for name in families if name not in queried}
    assert unseen <= {"process_virtual_memory_bytes", "process_start_time_seconds"}
    for variable in DASHBOARD["templating"]["list"]:
        for metric in re.findall(r"label_values\((\w+), instance\)", variable.get("definition", "")):
            assert metric in served.samples


async def test_every_alert_has_its_metrics(served):
    """Each expression parses and is served; names are unique, and the table in the documentation is this list."""
    for alert in ALERTS:
        labels = served.check(alert["expr"])
        used = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        assert used <= labels, alert["alert"]
    names = [alert["alert"] for alert in ALERTS]
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Lingbot\w+)` \|", text, re.MULTILINE) == names
    scraping = yaml.safe_load((ROOT / "configs/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    assert all((ROOT / "configs/prometheus" / name).is_file() for name in scraping["rule_files"])
    assert {job["job_name"] for job in scraping["scrape_configs"]} == {"lingbot-rt"}


@pytest.mark.parametrize(
    "query",
    [
        "lingbot_rt_sessions",  # served with _total
        "sum by (stage) (rate(lingbot_rt_chunk_ms_sum[5m]))",
        'rate(lingbot_rt_errors_total{code="nothing"}[5m])',
        "rate(lingbot_rt_frames_total)",
        "rate(lingbot_rt_connections[5m])",
        "histogram_quantile(0.5, sum by (instance) (rate(lingbot_rt_chunk_ms_bucket[5m])))",
        "sum by (stage) (lingbot_rt_ready) / lingbot_rt_ready",
        "sum by (code) (rate(lingbot_rt_errors_total[5m])) / sum by (instance) (rate(lingbot_rt_errors_total[5m]))",
        "lingbot_rt_ready)",
        "lingbot_rt_frames_total[5m]",
    ],
)
async def test_a_wrong_query_is_found(served, query):
    """Each kind of mistake that the two tests above are there for."""
    with pytest.raises(WrongQuery):
        served.check(query)


async def test_no_label_comes_from_a_client(served):
    """Every label has a handful of values, all of them words of the server."""
    for name, samples in served.samples.items():
        for label in samples[0]:
            values = {each[label] for each in samples}
            assert len(values) <= 20, (name, label)
            assert all(len(value) <= 32 for value in values), (name, label)


async def test_sessions_by_state(serve):
    """A session that plays, one that waits in line, one that is paused, one that opens; none at the end."""
    server = await serve()

    async def states() -> dict[str, int]:
        found = re.findall(r'^lingbot_rt_live_sessions\{state="(\w+)"\} (\d+)', await exposition(server), re.MULTILINE)
        assert [name for name, _ in found] == list(SESSION_STATES)
        return {name: int(count) for name, count in found if int(count)}

    server.engine.may_open.clear()
    extensions = {"protocol_extensions": ["pause", "queue"]}
    async with server.client(init(**extensions)) as first:
        await wait_until(lambda: bool(server.engine.opening))
        assert await states() == {"opening": 1}
        async with server.client(init(**extensions)) as second:
            assert (await second.until("queue"))["position"] == 1
            assert await states() == {"opening": 1, "waiting": 1}
            server.engine.may_open.set()
            await first.chunk()
            assert await states() == {"playing": 1, "waiting": 1}
            await first.send(event("pause"))
            (connection,) = (each for each in server.service.connections if each.state != "waiting")
            await wait_until(lambda: connection.state == "paused")
            assert await states() == {"paused": 1, "waiting": 1}
    await server.idle()
    assert await states() == {}


@pytest.mark.parametrize(
    ("engine", "fields", "reason"),
    [
        (FakeEngine, {"max_chunks": 1}, "complete"),
        (lambda: FakeEngine(fail_at_chunk=1), {}, "engine_failed"),
        (FakeEngine, {}, "client_gone"),
    ],
)
async def test_sessions_by_end(engine, fields, reason):
    """A session that opened is counted once, by why it ended; a refused one is not."""
    async with running(engine()) as server:
        async with server.client(init(**fields)) as client:
            await client.chunk()
            if reason != "client_gone":
                await client.closed()
        async with server.client(init(size="1x1")) as refused:
            await refused.error()
        await server.idle()
        text = await exposition(server)
    ends = re.findall(r'^lingbot_rt_session_ends_total\{reason="(\w+)"\} (\d+)', text, re.MULTILINE)
    assert [(name, count) for name, count in ends if count != "0"] == [(reason, "1")]
    assert "lingbot_rt_sessions_total 1.0" in text


async def test_a_shutdown_is_an_end_of_its_own(serve):
    server = await serve()
    async with server.client(init()) as client:
        await client.chunk()
        for connection in list(server.service.connections):
            connection.stop()
        await client.closed()
    await server.idle()
    assert 'session_ends_total{reason="shutting_down"} 1.0' in await exposition(server)


async def test_bytes_that_the_socket_has_not_taken(serve, monkeypatch):
    """While a write is stuck its bytes are pending; afterwards nothing is."""
    gate, write = asyncio.Event(), Connection._write

    async def stuck(self, data: bytes, *, more: bool) -> None:
        await gate.wait()
        await write(self, data, more=more)

    monkeypatch.setattr(Connection, "_write", stuck)
    server = await serve()
    async with server.client(init(max_chunks=1)) as client:
        (connection,) = await _connections(server)
        await wait_until(lambda: connection.outbox_bytes > 64 * 64 * 3)
        pending = re.search(r"^lingbot_rt_outbox_bytes (\S+)", await exposition(server), re.MULTILINE)
        assert float(pending[1]) == connection.outbox_bytes
        gate.set()
        await client.closed()
    await server.idle()
    assert connection.outbox_bytes == 0


async def _connections(server) -> list[Connection]:
    await wait_until(lambda: bool(server.service.connections))
    return list(server.service.connections)


def test_stages_of_a_chunk():
    """The stages are the engine's and the transport's times; what did not run has none."""
    stats = ChunkStats("s", "s", 0, header_write_ms=1, raw_write_ms=2, raw_payload_build_ms=3)
    timings = ChunkTimings(
        4, 21, 7, 36, {"recache": 6, "denoise": 10, "context": 5}, {"upscale_ms": 8, "interpolate_ms": 1}
    )
    expected = {
        "prepare": 4,
        "recache": 6,
        "denoise": 10,
        "context": 5,
        "decode": 7,
        "postprocess": 9,
        "encode": 3,
        "send": 3,
    }
    assert stage_times(stats, timings) == expected
    assert list(expected) == list(STAGES)
    plain = stage_times(stats, ChunkTimings(4, 15, 7, 30, {"denoise": 10, "context": 5}))
    assert set(STAGES) - set(plain) == {"recache", "postprocess"}


def test_realtime_factor():
    """12 frames at 16 frames/s play for 750 ms: an engine that needs 500 ms is 1.5 times as fast."""
    metrics = Metrics()
    metrics.count_chunk(ChunkStats("s", "s", 0, num_frames=12), ChunkTimings(0, 0, 0, 500), 16)
    samples = {sample.name: sample.value for sample in next(iter(metrics.realtime_factor.collect())).samples}
    assert samples["lingbot_rt_realtime_factor_sum"] == 1.5
