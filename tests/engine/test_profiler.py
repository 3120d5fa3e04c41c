"""Profiler traces of chunks that an engine runs."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from lingbot_rt.engine import profiler
from lingbot_rt.engine.engine import Engine
from tests.engine.test_engine import chunk, finish


@pytest.fixture
async def engine(golden_config):
    engine = Engine(golden_config)
    await engine.start()
    yield engine
    await engine.stop()


async def test_the_next_chunks_are_recorded(engine, session_plan, tmp_path):
    """As many as were asked for, as a Chrome trace with the operations of the networks; later chunks are not."""
    plan = session_plan({})
    await engine.open(plan)
    file = tmp_path / "a.json.gz"
    asked = asyncio.create_task(engine.profile(1, file, 3600))
    await asyncio.sleep(0)
    await finish(engine.run(chunk(plan)))
    assert await asked == 1
    with gzip.open(file) as text:
        events = json.load(text)["traceEvents"]
    assert any(event.get("name") == "aten::linear" for event in events)
    written = file.stat().st_size
    await finish(engine.run(chunk(plan, 1)))
    assert file.stat().st_size == written


async def test_what_came_in_time_is_written(engine, session_plan, tmp_path):
    """One chunk of the two: the trace has that one. Without any there is no file."""
    file = tmp_path / "a.json.gz"
    assert await engine.profile(2, file, 0) == 0
    assert not file.exists()
    plan = session_plan({})
    await engine.open(plan)
    asked = asyncio.create_task(engine.profile(2, file, 3600))
    await asyncio.sleep(0)
    await finish(engine.run(chunk(plan)))
    recording = engine._profiler._recording
    assert recording.recorded == 1
    recording.complete.set()  # as at the end of the time
    assert await asked == 1
    assert file.exists()


async def test_a_profiler_that_does_not_start_breaks_no_chunk(engine, session_plan, tmp_path, monkeypatch):
    """The chunk has its frames, and the request hears of no chunk."""

    class Broken:
        def __init__(self, **options) -> None: ...

        def start(self) -> None:
            raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(profiler, "profile", Broken)
    plan = session_plan({})
    await engine.open(plan)
    asked = asyncio.create_task(engine.profile(1, tmp_path / "a.json.gz", 3600))
    await asyncio.sleep(0)
    assert (await finish(engine.run(chunk(plan)))).num_frames == 9
    assert await asked == 0
    assert list(tmp_path.iterdir()) == []
