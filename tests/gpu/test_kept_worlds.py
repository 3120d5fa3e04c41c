"""Kept worlds on the accelerator: noise drawn there, and a window in fp8 behind the fused kernels."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from lingbot_rt.config import BUILTIN, ServeConfig
from lingbot_rt.engine import memory
from lingbot_rt.engine.engine import Engine
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.errors import ConfigError
from lingbot_rt.models.quantize import require_fp8
from lingbot_rt.session.plan import Rewound
from tests.engine.test_going_back import CHUNKS, Walk, plans, same

from .conftest import DEVICE

pytestmark = pytest.mark.gpu

HOST = torch.device("cpu")
TWO_RINGS = {"sink_frames": 4, "window_frames": 13, "recent_frames": (2, 6), "num_steps": 2}


@pytest.fixture(scope="module", params=["float32", "fp8"])
def config(request, golden_config) -> ServeConfig:
    """The golden checkpoint in float32, and random weights of the built-in model's shapes with all that is in fp8."""
    if request.param == "float32":
        return dataclasses.replace(golden_config, device=DEVICE.type, compile="false")
    try:
        require_fp8(DEVICE, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    return ServeConfig(
        model_path=BUILTIN,
        load_format="dummy",
        device=DEVICE.type,
        dtype="bfloat16",
        compile="false",
        quantization="fp8",
        kv_cache_dtype="fp8",
        warmup=False,
    )


@pytest.fixture(scope="module")
def loaded(config) -> Pipeline:
    return load_pipeline(config, lambda status: None)


def keeping(pipeline: Pipeline, *, kv: bool) -> Pipeline:
    return dataclasses.replace(pipeline, history_bytes=2**30, keeps_kv=kv)


def test_with_keys_and_values_it_goes_on_bit_for_bit(loaded, session_plan):
    """Back to any boundary, the window having slid, and once off the device and back."""
    walk = Walk(keeping(loaded, kv=True), session_plan({}, **TWO_RINGS))
    expected = walk.run(0)
    for boundary in (CHUNKS, 6, 3, 0):
        assert walk.go_back(boundary)
        if boundary == 3:
            walk.session.move(HOST)
            walk.session.move(DEVICE)
        assert same(walk.run(boundary), expected[boundary:])
    assert expected[-1].std() > 1


def test_from_latents_it_goes_on_bit_for_bit_until_the_window_slides(loaded, session_plan):
    walk = Walk(keeping(loaded, kv=False), session_plan({}, window_frames=18, recent_frames=(3, 9), num_steps=2))
    expected = walk.run(0)
    for boundary in (5, 1, 0):
        assert walk.go_back(boundary)
        assert same(walk.run(boundary), expected[boundary:])


def test_a_window_that_is_computed_again_has_the_keys_and_values_of_before(loaded, session_plan):
    """From latents alone, after the window has slid: its slots are filled out of their order, and each forward sees
    those before it only. The noise of what follows is the same."""
    walk = Walk(keeping(loaded, kv=False), session_plan({}, **TWO_RINGS))
    expected = walk.run(0)
    cache = walk.session.cache
    before = {frame: cache.read(frame).float() for frame in cache.frame_of_slot if frame is not None}
    assert not walk.go_back(CHUNKS)
    first, *_, newest = sorted(before)
    for frame, limit in ((first, 0.02), (newest, 0.5)):
        again = cache.read(frame).float()
        assert torch.isfinite(again).all()
        assert (again - before[frame]).norm() <= limit * before[frame].norm()
    assert not walk.go_back(8)
    assert walk.run(8)[0].shape == expected[8].shape


async def chunks_of(engine: Engine, plan, first: int, end: int) -> list[np.ndarray]:
    return [np.concatenate([group.pixels async for group in engine.run(each)]) for each in plans(plan)[first:end]]


def test_sessions_that_take_turns_and_files_of_them(config, session_plan, monkeypatch):
    """Two sessions of which one has room, chunk by chunk, are those that have the device alone. The file of one goes on
    in a third as it does itself."""
    alike = [session_plan({}, session_id=name, seed=seed, window_frames=9) for seed, name in enumerate("ab")]

    async def play() -> None:
        engine = Engine(dataclasses.replace(config, snapshot_kv=True))
        await engine.start()
        try:
            expected = []
            for plan in alike:
                await engine.open(plan)
                expected.append(await chunks_of(engine, plan, 0, 6))
                await engine.close(plan.session_id)
            monkeypatch.setattr(memory, "free_bytes", lambda device: 0 if engine._residency._on_device else 10**12)
            for plan in alike:
                await engine.open(plan)
            for index in range(6):
                for plan, frames in zip(alike, expected, strict=True):
                    assert same(await chunks_of(engine, plan, index, index + 1), [frames[index]])
                if index == 3:
                    file = await engine.snapshot("a", "")
            assert engine._residency.on_host == {"a"}
            other = dataclasses.replace(alike[0], session_id="other")
            assert await engine.open(other, file) == Rewound(4, 0, True)
            assert same(await chunks_of(engine, other, 4, 6), expected[0][4:])
        finally:
            await engine.stop()

    asyncio.run(play())
