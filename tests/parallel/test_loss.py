"""A rank that dies, fails or stalls: the error says which and why, and no process is left. Real processes."""

from __future__ import annotations

import re

import pytest

from lingbot_rt.engine.engine import Engine
from lingbot_rt.errors import CapacityError, EngineFailed
from tests.parallel.conftest import chunk, config, engine_of, session_plan, stopped


def assert_none_left(engine: Engine) -> None:
    processes = engine._coordinator._processes
    assert processes
    assert all(process.poll() is not None for process in processes.values())


async def lost_in_chunk(engine: Engine) -> str:
    """The error of the chunk in which a rank is lost."""
    with pytest.raises(EngineFailed) as failure:
        async for _ in engine.run(chunk(0)):
            pass
    assert engine.is_lost
    assert engine.status.stage == "failed"
    assert engine.status.detail == str(failure.value)
    with pytest.raises(EngineFailed, match=r"^rank 1 "):
        await engine.open(session_plan("another"))
    return str(failure.value)


async def test_a_rank_that_raises(broken):
    """An exception in one rank's chunk fails the chunk with that rank and the exception's first line."""
    broken("raise", 1)
    async with engine_of(2) as engine:
        await engine.open(session_plan())
        assert await lost_in_chunk(engine) == "rank 1 failed: ValueError: the kernel said no"
    assert_none_left(engine)


async def test_a_rank_without_memory(broken):
    """A rank that runs out of memory inside an exchange is named for that. It has not lost another rank."""
    broken("memory", 1)
    async with engine_of(2) as engine:
        await engine.open(session_plan())
        assert await lost_in_chunk(engine) == "rank 1 failed: OutOfMemoryError: CUDA out of memory"
    assert_none_left(engine)


async def test_a_rank_with_less_room_is_asked_first(broken):
    """A session that another rank has no memory for is refused with that rank's numbers, and the next one runs."""
    broken("full", 1)
    async with engine_of(2) as engine:
        with pytest.raises(CapacityError, match=r"needs 0\.\d GB on rank 1, 0\.0 GB is free there: use a smaller size"):
            await engine.open(session_plan())
        await engine.open(session_plan())
        assert sum([len(group.pixels) async for group in engine.run(chunk(0))]) == 9
    assert_none_left(engine)


async def test_a_rank_that_stalls(broken):
    """A rank that makes no progress while others wait for it is named after the time limit."""
    broken("stall", 1)
    async with engine_of(2) as engine:
        await engine.open(session_plan())
        # Long enough that a busy machine does not count as a stall.
        engine._coordinator._watchdog.limit_s = 4.0
        assert re.match(r"rank 1 stalled: for \d+ s it has not come to exchange", await lost_in_chunk(engine))
    assert_none_left(engine)


async def test_a_rank_that_does_not_come_up(broken):
    """An error while loading fails the start and names the rank. All ranks end."""
    broken("load", 1)
    engine = Engine(config(2))
    with pytest.raises(EngineFailed) as failure:
        await engine.start()
    assert str(failure.value) == "rank 1 failed: CheckpointError: a shard is damaged"
    await stopped(engine)
    assert_none_left(engine)
