"""``bench serve``: a real client on a real socket, against the real server around an engine without a model."""

from __future__ import annotations

import asyncio
import json

import pytest

from lingbot_rt.bench.serve import Visit, model_facts, serve_report, visit
from lingbot_rt.cli import main
from lingbot_rt.client import SessionLost
from tests.server.conftest import png, running
from tests.server.fake_engine import FakeEngine


def plan(url: str, **changes) -> Visit:
    init = {"prompt": "A street.", "first_frame": png(), "size": "64x64", "max_chunks": 6, "fps": 120}
    values = {"press_every_s": 0.03, "playback_fps": 30, "playback_lead_s": 0.2, "init": init, "api_key": None}
    return Visit(url=url, **(values | changes))


async def test_one_visit():
    """Every frame of every chunk is seen once, presses come back in frames, and each chunk's statistics are there."""
    async with running(FakeEngine(group_s=0.02)) as server:
        asked = plan(server.http)
        seen = await asyncio.to_thread(visit, asked, lambda: None)
    assert len(seen.frames) == 9 + 5 * 12
    assert len(seen.pressed) >= 2
    report = serve_report(asked, {}, seen)
    assert (report.frames, report.chunks) == (69, 6)
    assert report.first_frame_s > 0
    assert report.frames_per_s > 0
    assert report.server_ms["chunk"].count == 5
    assert report.chunk_interval_ms.count == 5
    assert 0 < report.events <= len(seen.pressed)
    assert report.event_to_frame_ms.p50 > 0
    assert "first_frame" not in report.init


async def test_a_session_of_one_chunk():
    """What a single chunk cannot tell is left out, not made up."""
    async with running(FakeEngine()) as server:
        init = dict(plan(server.http).init) | {"max_chunks": 1}
        asked = plan(server.http, press_every_s=100.0, init=init)
        seen = await asyncio.to_thread(visit, asked, lambda: None)
    report = serve_report(asked, {}, seen)
    assert report.frames == 9
    assert (report.frames_per_s, report.chunk_interval_ms, report.event_to_frame_ms) == (None, None, None)
    assert report.server_ms["chunk"].count == 1


async def test_an_engine_that_breaks_ends_the_measurement():
    """No figures of a session that was lost, and no thread that goes on pressing keys."""
    async with running(FakeEngine(group_s=0.01, fail_at_chunk=2)) as server:
        with pytest.raises(SessionLost):
            await asyncio.to_thread(visit, plan(server.http), lambda: None)


async def test_model_facts():
    """The server's own words on model and device; none of a server that is not there."""
    async with running(FakeEngine()) as server:
        facts = await asyncio.to_thread(model_facts, server.ws, None)
        gone = server.http
    assert facts == {"id": "fake-world", "device": "cpu", "dtype": "float32", "num_ranks": 1}
    assert await asyncio.to_thread(model_facts, gone, None) == {}


async def test_command_line(tmp_path, capsys):
    """The words, the table and the file of one command; other fields of the init pass through."""
    figures = tmp_path / "serve.json"
    line = "--chunks 4 --fps 120 --press-every 0.03 --playback-fps 24 --format raw --init seed=7 --init pacing=false"
    async with running(FakeEngine(group_s=0.02)) as server:
        words = ["bench", "serve", "--url", server.http, *line.split(), "--json", str(figures)]
        assert await asyncio.to_thread(main, words) == 0
    printed = capsys.readouterr().out
    assert "fake-world, cpu, float32, 1" in printed
    assert "client: key to frame" in printed
    told = json.loads(figures.read_text())
    assert told["init"]["seed"] == 7
    assert told["frames"] == 45
    assert told["playback"]["fps"] == 24
    assert set(told["server_ms"]) >= {"chunk", "DiT", "VAE", "encode"}


@pytest.mark.parametrize(
    "line", ["serve --fps 0", "serve --press-every soon", "pipeline --chunks 0", "transport --frames -1"]
)
def test_wrong_numbers_are_named(line, capsys):
    """A number that cannot be is refused with the flag's name."""
    with pytest.raises(SystemExit):
        main(["bench", *line.split()])
    assert "argument --" in capsys.readouterr().err
