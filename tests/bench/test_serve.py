"""``bench serve``: a real client on a real socket, against the real server around an engine without a model."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from lingbot_rt.bench.serve import SessionSpec, model_facts, run_session, serve_report
from lingbot_rt.cli import main
from lingbot_rt.client import SessionLost
from tests.server.conftest import png, running
from tests.server.fake_engine import FakeEngine


def spec(url: str, **changes) -> SessionSpec:
    init = {"prompt": "A street.", "first_frame": png(), "size": "64x64", "max_chunks": 6, "fps": 120}
    values = {"press_every_s": 0.03, "playback_fps": 30, "playback_lead_s": 0.2, "init": init, "api_key": None}
    return SessionSpec(url=url, **(values | changes))


async def test_one_session():
    """Every frame of every chunk is counted once, key presses come back in frames, and all statistics are there."""
    async with running(FakeEngine(group_s=0.02)) as server:
        measured = spec(server.http)
        observed = await asyncio.to_thread(run_session, measured, lambda: None)
    assert len(observed.frames) == 9 + 5 * 12
    assert len(observed.pressed) >= 2
    report = serve_report(measured, {}, observed)
    assert (report.frames, report.chunks) == (69, 6)
    assert report.first_frame_s > 0
    assert report.frames_per_s > 0
    assert report.server_ms["chunk"].count == 5
    assert report.chunk_interval_ms.count == 5
    assert 0 < report.events <= len(observed.pressed)
    assert report.event_to_frame_ms.p50 > 0
    assert "first_frame" not in report.init


async def test_a_session_of_one_chunk():
    """Figures that need two chunks are None."""
    async with running(FakeEngine()) as server:
        init = dict(spec(server.http).init) | {"max_chunks": 1}
        measured = spec(server.http, press_every_s=100.0, init=init)
        observed = await asyncio.to_thread(run_session, measured, lambda: None)
    report = serve_report(measured, {}, observed)
    assert report.frames == 9
    assert (report.frames_per_s, report.chunk_interval_ms, report.event_to_frame_ms) == (None, None, None)
    assert report.server_ms["chunk"].count == 1


async def test_an_engine_that_breaks_ends_the_measurement():
    """A lost session raises, and its key-pressing thread ends."""
    async with running(FakeEngine(group_s=0.01, fail_at_chunk=2)) as server:
        with pytest.raises(SessionLost):
            await asyncio.to_thread(run_session, spec(server.http), lambda: None)
        assert not [thread for thread in threading.enumerate() if thread.name == "keys"]


async def test_model_facts():
    """Model and device as the server reports them; empty if nothing answers."""
    async with running(FakeEngine()) as server:
        facts = await asyncio.to_thread(model_facts, server.ws, None)
        gone = server.http
    assert facts == {"id": "fake-world", "device": "cpu", "dtype": "float32", "num_ranks": 1}
    assert await asyncio.to_thread(model_facts, gone, None) == {}


async def test_command_line(tmp_path, capsys):
    """One command prints the table and writes the file. --init fields reach the server."""
    figures = tmp_path / "serve.json"
    line = "--chunks 4 --fps 120 --press-every 0.03 --playback-fps 24 --format raw --init seed=7 --init profile=false"
    async with running(FakeEngine(group_s=0.02)) as server:
        words = ["bench", "serve", "--url", server.http, *line.split(), "--json", str(figures)]
        assert await asyncio.to_thread(main, words) == 0
    printed = capsys.readouterr().out
    assert "fake-world, cpu, float32, 1" in printed
    assert "client: key to frame" in printed
    written = json.loads(figures.read_text())
    assert written["init"]["seed"] == 7
    assert written["frames"] == 45
    assert written["playback"]["fps"] == 24
    assert set(written["server_ms"]) >= {"chunk", "DiT", "VAE", "encode"}


@pytest.mark.parametrize(
    "line", ["serve --fps 0", "serve --press-every soon", "pipeline --chunks 0", "transport --frames -1"]
)
def test_wrong_numbers_are_named(line, capsys):
    """An impossible number is refused with the flag's name and exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["bench", *line.split()])
    assert end.value.code == 2
    assert "argument --" in capsys.readouterr().err
