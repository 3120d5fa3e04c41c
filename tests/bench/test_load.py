"""``bench load``: several clients on real sockets, against the real server around an engine without a model."""

from __future__ import annotations

import asyncio
import json

import pytest

from lingbot_rt.bench.load import Load, LoadSpec, Visit, as_text, load_report
from lingbot_rt.cli import main
from lingbot_rt.client import ConnectFailed, InitRefused
from lingbot_rt.commands.bench_load import duration
from tests.server.conftest import png, running
from tests.server.fake_engine import FakeEngine


def spec(url: str, *, extensions=("queue", "session"), **changes) -> LoadSpec:
    init = {
        "prompt": "A street.",
        "first_frame": png(),
        "size": "64x64",
        "num_frames": 9,
        "max_chunks": 3,
        "protocol_extensions": list(extensions),
        "realtime_output_pacing": False,
    }
    return LoadSpec(
        **({"url": url, "api_key": None, "init": init, "clients": 3, "for_s": 120.0, "rounds": 2} | changes)
    )


async def run(measured: LoadSpec) -> Load:
    load = Load(measured)
    await asyncio.to_thread(load.run, lambda took_s, state: None)
    return load


async def test_clients_take_turns():
    """Every client gets its sessions whole, one at a time, and those that waited have waited."""
    async with running(FakeEngine()) as server:
        measured = spec(server.http)
        load = await run(measured)
    report = load_report(measured, {}, load)
    assert (report.sessions, report.completed, report.playing_at_end, report.waiting_at_end) == (6, 6, 0, 0)
    assert report.frames == 6 * (9 + 12 + 12)
    assert report.waiting_ms.count == report.start_ms.count == report.first_frame_ms.count == 6
    assert report.chunk_interval_ms.count == 12
    assert report.errors == {}
    assert any(visit.queued for visit in load.visits)
    assert all(visit.asked_at <= visit.granted_at <= visit.first_frame_at for visit in load.visits)
    assert len(server.engine.opened) == 6
    assert report.received_bytes > 0
    assert "first_frame" not in report.init


async def test_who_still_waits_when_the_time_is_up():
    """A client in line and one that plays are told apart, and the wait that has not ended counts as the longest."""
    async with running(FakeEngine()) as server:
        endless = spec(server.http).init | {"max_chunks": None}
        measured = spec(server.http, init=endless, clients=2, rounds=None)
        load = Load(measured)

        def end_once_both_are_there(took_s: float, state: str) -> None:
            if state == "1 playing, 1 waiting, 0 ended" and any(visit.chunk_ends for visit in load.visits):
                raise InterruptedError

        with pytest.raises(InterruptedError):
            await asyncio.to_thread(load.run, end_once_both_are_there)
        await server.idle()
    report = load_report(measured, {}, load)
    assert (report.sessions, report.completed, report.playing_at_end, report.waiting_at_end) == (1, 0, 1, 1)
    assert report.waiting_ms.count == 1
    waiting = next(visit for visit in load.visits if visit.granted_at is None)
    assert report.longest_wait_s == pytest.approx(load.ended_at - waiting.asked_at)


async def test_refusals_are_counted_by_code(monkeypatch):
    """Clients that do not wait in line are refused while another one plays; they ask again."""
    monkeypatch.setattr("lingbot_rt.bench.load.RETRY_S", 0.01)
    async with running(FakeEngine(group_s=0.02), session_wait_s=0) as server:
        measured = spec(server.http, extensions=(), clients=2, rounds=3)
        load = await run(measured)
    report = load_report(measured, {}, load)
    assert len(load.visits) == 6
    assert report.errors.keys() == {"session_busy"}
    assert report.sessions + report.errors["session_busy"] == 6
    assert f"session_busy {report.errors['session_busy']}" in as_text(report)


async def test_an_engine_that_breaks_is_an_error_by_code(monkeypatch):
    monkeypatch.setattr("lingbot_rt.bench.load.RETRY_S", 0.01)
    async with running(FakeEngine(fail_at_chunk=1)) as server:
        measured = spec(server.http, clients=1, rounds=1)
        report = load_report(measured, {}, await run(measured))
    assert (report.sessions, report.completed) == (1, 0)
    assert report.errors == {"engine_failed": 1}


async def test_what_every_session_would_be_refused_for_ends_the_load():
    """A wrong init, and a server that is not there, are one named error."""
    async with running(FakeEngine()) as server:
        gone = server.http
        wrong = spec(gone).init | {"first_frame": b"no picture"}
        with pytest.raises(InitRefused, match="first_frame"):
            await run(spec(gone, init=wrong))
    with pytest.raises(ConnectFailed, match="does not answer"):
        await run(spec(gone))


def test_without_a_frame_there_are_no_percentiles():
    """The table has dashes, and nothing is divided by zero."""
    load = Load(spec("http://127.0.0.1:9"))
    load.visits.append(Visit(0.0, error="session_busy", ended_at=1.0))
    report = load_report(spec("http://127.0.0.1:9"), {}, load)
    assert (report.first_frame_ms, report.session_frames_per_s, report.frames) == (None, None, 0)
    assert "session_busy 1" in as_text(report)


async def test_command_line(tmp_path, capsys):
    """One command prints the table and writes the file. --init fields reach the server."""
    figures = tmp_path / "load.json"
    line = "--sessions 2 --for 2m --rounds 1 --chunks 2 --init seed=7 --init realtime_output_pacing=false"
    async with running(FakeEngine()) as server:
        words = ["bench", "load", "--url", server.http, *line.split(), "--json", str(figures)]
        assert await asyncio.to_thread(main, words) == 0
    printed = capsys.readouterr().out
    assert "fake-world, cpu, float32, 1" in printed
    assert "waiting in line, ms" in printed
    written = json.loads(figures.read_text())
    assert (written["clients"], written["sessions"], written["completed"]) == (2, 2, 2)
    assert written["init"]["seed"] == 7
    assert written["errors"] == {}
    assert written["first_frame_ms"]["count"] == 2


def test_durations():
    """Seconds, minutes and hours; anything else is refused with what is expected."""
    assert [duration(text) for text in ("90", "60s", "1.5m", "2h")] == [90, 60, 90, 7200]
    for text in ("", "0s", "-1s", "1d", "soon", "1e3", "9999999h", "١s"):
        with pytest.raises(Exception, match="expected a time such as 60s"):
            duration(text)
