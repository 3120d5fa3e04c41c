"""Compiled code on the accelerator: all of it before a session opens, and a chunk that never makes the host wait."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.compilation import resolve_compile
from lingbot_rt.engine.engine import Engine
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import default_plan
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, SessionPlan
from lingbot_rt.shapes import pixel_frames_of_chunk
from tests.engine.test_golden_sessions import psnr

from .conftest import DEVICE, frames_of

# The compiler warns of what it could do faster.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(small_config, runner) -> Iterator[Engine]:
    """Warmed up at 64x64. Compilation takes longer than its --chunk-timeout-s."""
    if not resolve_compile("auto", DEVICE):
        pytest.skip("no compiler")
    engine = Engine(
        dataclasses.replace(
            small_config, device=DEVICE.type, dtype="auto", compile="true", warmup=True, chunk_timeout_s=20
        )
    )
    runner.run(engine.start())
    yield engine
    runner.run(engine.stop())


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_nothing_compiles_after_warm_up(engine, session_plan):
    """Twelve chunks (first one, growing window, sliding window, new prompt, no camera) and a session with guidance run
    on what warm-up compiled."""
    before = compiled_graphs()
    assert before > 0
    frames_of(engine._pipeline, session_plan({}), 12)
    frames_of(engine._pipeline, session_plan({}, guidance_scale=3.0, negative_prompt="a dark forest", num_steps=2), 3)
    assert compiled_graphs() == before
    assert not torch._dynamo.utils.counters["graph_break"]


def test_no_wait_inside_a_chunk(engine, small_config):
    """No operation of a warm chunk makes the host wait for the device, and compiled chunks equal eager ones.

    40 dB: on a CPU, bfloat16 frames of these six chunks are at 52 dB of float32 ones, frames of another prompt at 25.
    """
    config = dataclasses.replace(small_config, device=DEVICE.type, dtype="auto", compile="false")
    eager = load_pipeline(config, lambda status: None)
    plan = default_plan(eager)
    expected = six_chunks(eager)
    got = six_chunks(engine._pipeline, sync_is_error_from=3)
    for index, (frames, eager_frames) in enumerate(zip(got, expected, strict=True)):
        assert len(frames) == pixel_frames_of_chunk(index, plan.latent_frames)
        assert psnr(frames, eager_frames) >= 40


@torch.inference_mode()
def six_chunks(pipeline: Pipeline, sync_is_error_from: int = 6) -> list[np.ndarray]:
    """The frames of a default session by chunk, with a new prompt at chunk 4.

    From chunk ``sync_is_error_from`` on, an operation that waits for the device raises.
    """
    plan = default_plan(pipeline)
    session, camera, chunks = SessionState(pipeline, plan), CameraPath(), []
    for index in range(6):
        prompt = plan.prompt if index < 4 else "a forest at night"
        poses = camera.extend((("w",),) * plan.latent_frames)
        groups = []
        torch.cuda.set_sync_debug_mode("error" if index >= sync_is_error_from else "default")
        try:
            run_chunk(pipeline, session, ChunkPlan(plan.session_id, index, prompt, poses, None), groups.append)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        chunks.append(np.concatenate([group.pixels for group in groups]))
    return chunks


async def play(engine: Engine, plan: SessionPlan, chunks: int = 4) -> int:
    """Runs a session; how many graphs were compiled once it was open."""
    await engine.open(plan)
    before, camera = compiled_graphs(), CameraPath()
    for index in range(chunks):
        poses = None if index == chunks - 1 else camera.extend((("w",),) * plan.latent_frames)
        run = engine.run(ChunkPlan(plan.session_id, index, plan.prompt, poses, None))
        frames = np.concatenate([group.pixels async for group in run])
        assert frames.shape[1:3] == (plan.size.height, plan.size.width)
        assert frames.std() > 1
    await engine.close(plan.session_id)
    return compiled_graphs() - before


def test_a_session_of_another_size_compiles_before_it_opens(engine, runner, session_plan):
    """Its chunks compile nothing, the watch on the engine's thread does not take the compilation for a hang, and the
    next sessions of all shapes open at once. A session with short chunks is another shape."""
    new, own = session_plan({"size": "96x64"}, session_id="new"), session_plan({}, session_id="own")
    short = session_plan({"num_frames": 1}, session_id="short")
    for plan in (new, short):
        assert engine.warm_up_of(plan) is not None
        before = compiled_graphs()
        assert runner.run(play(engine, plan, 6)) == 0
        assert compiled_graphs() > before
    compiled = compiled_graphs()
    assert engine.warm_sizes == (own.size, new.size)
    for plan in (own, new, short):
        assert runner.run(play(engine, plan)) == 0
    assert compiled_graphs() == compiled
    assert engine.status.ready
