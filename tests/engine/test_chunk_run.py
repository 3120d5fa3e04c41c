"""The frames of a chunk that another thread makes, as its sessions take them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from lingbot_rt.engine.chunk_run import ThreadedChunkRun
from lingbot_rt.errors import EngineFailed
from lingbot_rt.session.plan import FrameGroup

GROUP = FrameGroup(0, 0, 1, np.zeros((1, 2, 2, 3), np.uint8))


@pytest.mark.parametrize("fails", [False, True])
async def test_whoever_comes_after_the_end_sees_it_too(fails):
    """A stream takes the frames and the error of a chunk. If its client is lost meanwhile, the session that is parked
    asks the chunk again how it ended, and must not wait for ever."""

    async def work(emit):
        await asyncio.to_thread(emit, GROUP)
        if fails:
            raise EngineFailed("out of fuel")

    run = ThreadedChunkRun(work)
    taken = []
    async with asyncio.timeout(30):
        for _ in range(3):
            try:
                taken.append([group async for group in run])
            except EngineFailed as error:
                taken.append(str(error))
    assert taken == (["out of fuel"] * 3 if fails else [[GROUP], [], []])
