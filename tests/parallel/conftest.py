"""The built-in model, whose DiT has four heads, on real processes that communicate through gloo."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine import worker
from lingbot_rt.engine.engine import Engine
from lingbot_rt.parallel import coordinator
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.session.plan import ChunkPlan, SessionPlan
from lingbot_rt.shapes import FrameSize

SIZE = FrameSize(80, 48)
"""15 tokens per latent frame, 45 per chunk: neither 2 nor 4 ranks get equal numbers of them."""


@pytest.fixture(scope="session", autouse=True)
def checkout():
    """The workers import this checkout, also those that start elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(worker.__file__).parents[2]))
        patch.setenv("PYTHONPATH", str(Path(worker.__file__).parents[2]))
        yield


def config(world: int, **changes) -> ServeConfig:
    values = {"device": "cpu", "num_gpus": world, "warmup": False, "rank_timeout_s": 60.0, "log_level": "warning"}
    return ServeConfig(**values | changes)


@pytest.fixture(autouse=True)
def _processes(preloaded_workers, monkeypatch):
    """Workers start fast, but for those of whole servers. A lost rank does not end the process of the tests."""
    monkeypatch.setattr(coordinator, "_exit_now", lambda: None)


@asynccontextmanager
async def engine_of(world: int, **changes) -> AsyncIterator[Engine]:
    """A started engine of ``world`` processes, this one among them."""
    engine = Engine(config(world, **changes))
    try:
        await engine.start()
        yield engine
    finally:
        await stopped(engine)


async def stopped(engine: Engine) -> None:
    """A lost engine waits one second for its thread to leave the ranks, which take longer on a busy machine."""
    with suppress(TimeoutError):
        await asyncio.to_thread(engine._thread.submit(int).result, 60)
    await engine.stop()


def session_plan(session_id: str = "s", **changes) -> SessionPlan:
    values = {
        "session_id": session_id,
        "prompt": "a quiet street",
        "first_frame": np.random.default_rng(3).integers(0, 256, (SIZE.height, SIZE.width, 3), np.uint8),
        "size": SIZE,
        "latent_frames": 3,
        "seed": 11,
        "num_steps": 2,
        "guidance_scale": 1.0,
        "negative_prompt": "blurry",
        "sink_frames": 3,
        "window_frames": 9,
    }
    return SessionPlan(**values | changes)


def chunk(index: int, prompt: str = "a quiet street", *, camera: bool = False) -> ChunkPlan:
    poses = None
    if camera:
        poses = np.broadcast_to(np.eye(4), (3, 4, 4)).copy()
        poses[:, 2, 3] = 0.05 * (index + 1)
    return ChunkPlan("s", index, prompt, poses, None)


CHUNKS = 8


async def play(world: int, **changes) -> np.ndarray:
    """Eight chunks with guidance, camera, a new prompt, recache, and a window that slides, narrow twice -> frames."""
    frames: list[np.ndarray] = []
    async with engine_of(world, **changes) as engine:
        await engine.open(session_plan(guidance_scale=2.0, num_steps=4, recent_frames=(0, 2)))
        for index in range(CHUNKS):
            prompt = "a quiet street" if index < 5 else "a storm at sea"
            plan = chunk(index, prompt, camera=index != 2)
            plan = dataclasses.replace(plan, recent_frames={4: 2, 6: 0}.get(index), recache=index == 5)
            run = engine.run(plan)
            frames += [group.pixels async for group in run]
        assert len(run.result.timings.ranks_ms) == world
        await engine.close("s")
    return np.concatenate(frames)


class ThreadRank(RankGroup):
    """A rank in a thread, with a gloo group of its own. It is ``late_s`` late for each exchange."""

    def __init__(self, rank: int, world: int, store: dist.Store, late_s: float = 0.0) -> None:
        super().__init__(rank, world)
        self._gloo = dist.ProcessGroupGloo(store, rank, world, timedelta(minutes=5))
        self._late_s = late_s
        self.exchanged: list[tuple] = []  # shape of a row and type, in order

    def all_to_all(
        self, sent: Tensor, received: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int]
    ) -> None:
        assert sent.is_contiguous()  # NCCL refuses others
        assert received.is_contiguous()
        time.sleep(self._late_s)
        self.exchanged.append((*sent.shape[1:], sent.dtype))
        self.moved_bytes += sent[:1].nbytes * max(sum(rows) - rows[self.rank] for rows in (sent_rows, received_rows))
        self._gloo.alltoall_base(received, sent, list(received_rows), list(sent_rows)).wait()

    def gather(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        received = own.new_empty(sum(rows), *own.shape[1:])
        self.all_to_all(torch.cat([own] * self.world), received, [len(own)] * self.world, rows)
        return received


@pytest.fixture
def broken(monkeypatch) -> Callable[[str, int], None]:
    """``broken("stall", 1)``: workers started from now on have that fault on that rank."""

    def choose(fault: str, rank: int) -> None:
        script = Path(__file__).parent / "broken_worker.py"
        monkeypatch.setattr(worker, "_COMMAND", (sys.executable, str(script), fault, str(rank)))

    return choose
