"""Several processes compute what one computes, and all take the same branches."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest
import torch

from lingbot_rt.engine import chunk_runner, warmup
from lingbot_rt.errors import ChunkCancelled, EngineFailed, InvalidEvent
from tests.parallel.conftest import CHUNKS, SIZE, chunk, engine_of, play, session_plan

TOLERANCE = 2e-5


@pytest.fixture
def latents(monkeypatch) -> list[torch.Tensor]:
    """Every chunk's latents on rank 0, as they are denoised."""
    seen = []

    def recorded(*args):
        seen.append(denoise(*args))
        return seen[-1]

    denoise = chunk_runner.denoise
    monkeypatch.setattr(chunk_runner, "denoise", recorded)
    return seen


@pytest.fixture(scope="module")
def alone() -> tuple[list[torch.Tensor], np.ndarray]:
    """The latents and frames of one process."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        denoise = chunk_runner.denoise
        patch.setattr(chunk_runner, "denoise", lambda *args: (seen.append(denoise(*args)), seen[-1])[1])
        return seen, asyncio.run(play(1))


@pytest.mark.parametrize(("world", "vae_parallel"), [(2, "none"), (4, "width")])
async def test_ranks_compute_what_one_process_computes(world, vae_parallel, alone, latents):
    """Eight chunks of 45 tokens with guidance, camera, prompt change and a sliding window: latents agree to 2e-5,
    frames to one level of 255. With width, four ranks decode ten columns of latents."""
    expected, expected_frames = alone
    frames = await play(world, vae_parallel=vae_parallel)
    differences = [(a - b).abs().max().item() for a, b in zip(latents, expected, strict=True)]
    assert len(differences) == CHUNKS
    assert max(differences) <= TOLERANCE, differences
    assert frames.shape == expected_frames.shape == (12 * CHUNKS - 3, SIZE.height, SIZE.width, 3)
    assert np.abs(frames.astype(int) - expected_frames).max() <= 1
    assert frames.std() > 1


async def count_frames(run) -> int:
    return sum([len(group.pixels) async for group in run])


async def test_ranks_leave_a_chunk_together_or_not_at_all(monkeypatch):
    """close during the denoise and during the decode cancels the chunk on every rank, and the next session runs; an
    exception on rank 0 alone leaves the ranks at different places and ends the service."""

    def broken(*args):
        raise ValueError("the readback broke")

    async with engine_of(2, vae_parallel="width") as engine:
        for moment in ("denoise", "decode"):
            await engine.open(session_plan())
            await count_frames(engine.run(chunk(0)))
            reached, closing = threading.Event(), threading.Event()
            work = chunk_runner.denoise if moment == "denoise" else engine._pipeline.decode

            def held(*args, reached=reached, closing=closing, work=work):
                reached.set()  # without the wait the chunk may be over before the close begins
                assert closing.wait(60)
                return work(*args)

            with monkeypatch.context() as patch:
                if moment == "denoise":
                    patch.setattr(chunk_runner, "denoise", held)
                else:
                    patch.setattr(engine, "_pipeline", dataclasses.replace(engine._pipeline, decode=held))
                run = engine.run(chunk(1))
                assert await asyncio.to_thread(reached.wait, 60)
                close = asyncio.create_task(engine.close("s"))
                await asyncio.sleep(0)
                closing.set()
                await close
            with pytest.raises(ChunkCancelled):
                await count_frames(run)
        await engine.open(session_plan())
        assert await count_frames(engine.run(chunk(0))) == 9
        monkeypatch.setattr(chunk_runner.FrameReadback, "push", broken)
        with pytest.raises(EngineFailed, match=r"^rank 0 failed: ValueError: the readback broke$"):
            await count_frames(engine.run(chunk(1)))
        assert engine.is_lost


async def test_ranks_compile_for_a_new_size_together(monkeypatch):
    """A warm-up that is stopped ends on every rank at the same place, and the next session runs one whole. Meanwhile
    the ranks may stand still for --session-warmup-limit-s."""
    patience = []

    def recorded(pipeline, session, plan, emit):
        patience.append(engine._coordinator._watchdog._patience)
        if len(patience) == 2:
            engine._warm_up.stop()
        return run_chunk(pipeline, session, plan, emit)

    run_chunk = warmup.run_chunk
    monkeypatch.setattr(warmup, "run_chunk", recorded)
    async with engine_of(2, session_warmup_limit_s=540) as engine:
        info = dataclasses.replace(engine._pipeline.model_info, compiled=True)
        engine._pipeline = dataclasses.replace(engine._pipeline, model_info=info)
        with pytest.raises(ChunkCancelled):
            await engine.open(session_plan())
        await engine.close("s")
        await engine.open(session_plan())
        assert engine.warm_sizes == (SIZE,)
        assert patience == [10] * 4
        assert await count_frames(engine.run(chunk(0, camera=True))) == 9
        assert engine._coordinator._watchdog._patience == 1


async def test_ranks_go_back_together():
    """To a boundary of the session and to a snapshot, also after a move off the device: frames are those of before."""

    async def frames_of(engine, session_id: str, first: int) -> np.ndarray:
        frames = []
        for index in range(first, 5):
            plan = dataclasses.replace(chunk(index, camera=index != 2), session_id=session_id)
            frames += [group.pixels async for group in engine.run(plan)]
        return np.concatenate(frames)

    async with engine_of(2, vae_parallel="width") as engine:
        await engine.open(session_plan(window_frames=18))
        expected = await frames_of(engine, "s", 0)
        world = await engine.snapshot("s", "")
        assert (await engine.rewind("s", 3, 0, True)).exact
        assert np.array_equal(await frames_of(engine, "s", 3), expected[33:])
        await engine._on_thread(lambda: engine._move("s", True))
        await engine._on_thread(lambda: engine._move("s", False))
        with pytest.raises(InvalidEvent, match="kept of branch 1 are 0 to 5"):
            await engine.rewind("s", 6, 1, False)
        assert (await engine.rewind("s", 2, 1, False)).exact
        assert np.array_equal(await frames_of(engine, "s", 2), expected[21:])
        rewound = await engine.open(session_plan("t", window_frames=18), world)
        assert (rewound.chunk_index, rewound.exact) == (5, True)
        await engine.rewind("t", 1, 0, False)
        assert np.array_equal(await frames_of(engine, "t", 1), expected[9:])
