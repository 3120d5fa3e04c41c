"""Device memory over many sessions."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
import torch

from lingbot_rt.engine.engine import Engine
from lingbot_rt.errors import ChunkCancelled
from lingbot_rt.session.plan import ChunkPlan, SessionPlan

from .conftest import DEVICE, allocated_bytes

pytestmark = pytest.mark.gpu

SESSIONS = 200
ENDINGS = 4


async def drop(engine: Engine, plan: SessionPlan, ending: int) -> None:
    """A session that ends while it opens, once it is open, in its first chunk, or after it."""
    opening = asyncio.create_task(engine.open(plan))
    if ending == 0:
        await asyncio.sleep(0)
        opening.cancel()
    await asyncio.wait({opening})
    if ending > 1:
        run = engine.run(ChunkPlan(plan.session_id, 0, plan.prompt, None, None))
        await anext(aiter(run))
        if ending == 2:
            await engine.close(plan.session_id)
        with suppress(ChunkCancelled):
            async for _ in run:
                pass
    await engine.close(plan.session_id)


def test_dropped_sessions_leave_nothing(gpu_config, session_plan):
    """After 200 sessions that end in every way, with and without guidance, exactly as much is allocated as before them,
    and no more is taken from the device."""

    async def play() -> None:
        engine = Engine(gpu_config)
        await engine.start()
        try:
            flat = None
            for i in range(2 * ENDINGS + SESSIONS):
                if i == 2 * ENDINGS:
                    flat = allocated_bytes(), torch.cuda.memory_reserved(DEVICE)
                scale = 2.0 if i // ENDINGS % 2 else 1.0
                await drop(engine, session_plan({}, session_id=f"s{i}", guidance_scale=scale), i % ENDINGS)
            assert allocated_bytes() == flat[0]
            assert torch.cuda.memory_reserved(DEVICE) <= flat[1]
        finally:
            await engine.stop()

    asyncio.run(play())
