"""The async face: life cycle, failures, cancellation, memory of sessions."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine import chunk_runner, warmup
from lingbot_rt.engine import engine as engine_module
from lingbot_rt.engine.device import resolve_device, resolve_dtype
from lingbot_rt.engine.engine import Engine
from lingbot_rt.engine.memory import plan_memory, window_bytes
from lingbot_rt.engine.placement import Placement
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import warm_up
from lingbot_rt.errors import CapacityError, CheckpointError, ChunkCancelled, ConfigError, EngineFailed, InvalidInit
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.postprocess import loader
from lingbot_rt.postprocess.stage import PostprocessNetworks
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, PostprocessPlan
from lingbot_rt.shapes import FrameSize


@pytest.fixture
async def engine(golden_config):
    engine = Engine(golden_config)
    await engine.start()
    yield engine
    await engine.stop()


def chunk(plan, index: int = 0) -> ChunkPlan:
    return ChunkPlan(plan.session_id, index, plan.prompt, None, None)


async def finish(run) -> ChunkResult:
    """Takes every frame of a chunk."""
    count = sum([len(group.pixels) async for group in run])
    assert count == run.result.num_frames
    return run.result


async def test_a_session_runs_and_leaves(engine, session_plan):
    """open, run and close work in turn; a closed session cannot run and closing twice is no error."""
    plan = session_plan({})
    await engine.open(plan)
    assert (await finish(engine.run(chunk(plan)))).num_frames == 9
    await engine.close(plan.session_id)
    await engine.close(plan.session_id)
    with pytest.raises(EngineFailed, match="not open"):
        await finish(engine.run(chunk(plan, 1)))


async def test_warm_up_reports_and_ends_ready(small_config):
    """Starting with warm-up passes through loading and warming up, with progress, to ready."""
    seen = []
    engine = Engine(dataclasses.replace(small_config, warmup=True))
    report = engine._report
    engine._report = lambda status: (seen.append(status), report(status))
    await engine.start()
    assert engine.status.ready
    assert [status.stage for status in seen if status.progress == 1.0][-1] == "warming up"
    assert {"loading weights", "warming up", "ready"} <= {status.stage for status in seen}
    await engine.stop()
    assert engine.status.stage == "stopped"


async def test_a_missing_model_is_said_by_status_and_error(tmp_path):
    """A folder without a model fails the start with a CheckpointError, and /health's stage tells."""
    engine = Engine(ServeConfig(model_path=str(tmp_path), device="cpu"))
    with pytest.raises(CheckpointError):
        await engine.start()
    assert engine.status.stage == "failed"
    assert str(tmp_path) in engine.status.detail
    with pytest.raises(EngineFailed, match="not loaded"):
        _ = engine.model_info
    await engine.stop()


async def test_close_interrupts_the_chunk_in_work(engine, session_plan):
    """close during a chunk makes its iteration raise ChunkCancelled, and returns once the state is free."""
    plan = session_plan({})
    await engine.open(plan)
    decode, calls, go_on = engine._pipeline.decode, itertools.count(1), threading.Event()

    def held(*args):  # without it the chunk may be over before the close begins
        if next(calls) == engine.model_info.latent_frames:
            assert go_on.wait(30)
        return decode(*args)

    engine._pipeline = dataclasses.replace(engine._pipeline, decode=held)
    run = engine.run(chunk(plan))
    await anext(aiter(run))
    closing = asyncio.create_task(engine.close(plan.session_id))
    await asyncio.sleep(0)
    go_on.set()
    await closing
    with pytest.raises(ChunkCancelled):
        await finish(run)


async def test_a_chunk_runs_whether_or_not_its_frames_are_taken(engine, session_plan):
    """A chunk begins at once and ends by itself; its frames wait for whoever comes for them later."""
    plan = session_plan({})
    await engine.open(plan)
    runs = [engine.run(chunk(plan, index)) for index in range(2)]
    ended_at = [await run.finished() for run in runs]
    assert ended_at == sorted(ended_at)
    assert [(await finish(run)).num_frames for run in runs] == [9, 12]


async def test_close_while_opening_leaves_nothing(engine, session_plan):
    """A session closed before its open got to the engine thread does not stay behind."""
    plan = session_plan({})
    opening = asyncio.create_task(engine.open(plan))
    await asyncio.sleep(0)
    await engine.close(plan.session_id)
    await opening
    assert engine._sessions == {}


def allocated(state) -> list[weakref.ref]:
    """The tensors that make a session large."""
    tensors = [state.cache._kv_LSBNHD, state.negative.cache._kv_LSBNHD, state.condition(0)]
    tensors += [slot for slot in state.features.slots if isinstance(slot, torch.Tensor)]
    tensors += [tensor for pair in state.text_kv("A quiet street.") for tensor in pair]
    return [weakref.ref(tensor) for tensor in tensors]


@pytest.mark.parametrize("ending", ["between chunks", "in mid-chunk", "broken"])
async def test_a_closed_session_frees_its_memory_at_once(engine, session_plan, ending, monkeypatch):
    """Its tensors are gone when close returns: without the garbage collector, and whoever keeps the session, the chunk
    or the error with its traceback."""
    plan = session_plan({}, guidance_scale=2.0)
    await engine.open(plan)
    state = engine._sessions[plan.session_id]
    await finish(engine.run(chunk(plan)))
    gc.disable()
    try:
        if ending == "broken":
            monkeypatch.setattr(chunk_runner.FrameReadback, "push", lambda *args: 1 / 0)
        run, kept = engine.run(chunk(plan, 1)), []
        if ending != "between chunks":
            if ending == "in mid-chunk":
                state.cancel()
            try:
                await finish(run)
            except (ChunkCancelled, EngineFailed) as error:
                kept.append(error)
        else:
            await finish(run)
        tensors = allocated(state)
        assert len(tensors) > 10
        await engine.close(plan.session_id)
        assert [tensor() is None for tensor in tensors] == [True] * len(tensors)
        assert bool(kept) == (ending != "between chunks")
    finally:
        gc.enable()


async def test_an_error_that_is_kept_holds_nothing_of_its_chunk(engine, session_plan, monkeypatch):
    """The frames of a broken chunk's traceback hold latents and camera modulation: they are emptied."""
    plan = session_plan({})
    await engine.open(plan)
    latents = []

    def watched(*args):
        made = denoise(*args)
        latents.append(weakref.ref(made))
        return made

    def broken(self, pixels, *place):
        raise RuntimeError("the kernel said no")

    denoise = chunk_runner.denoise
    monkeypatch.setattr(chunk_runner, "denoise", watched)
    monkeypatch.setattr(chunk_runner.FrameReadback, "push", broken)
    with pytest.raises(EngineFailed, match="the kernel said no") as kept:
        await finish(engine.run(chunk(plan)))
    assert kept.value.__cause__ is not None
    assert latents[0]() is None


async def test_a_broken_chunk_is_named_and_the_engine_lives(engine, session_plan, monkeypatch):
    """An exception inside a chunk becomes EngineFailed with its first line; the next session runs."""
    plan = session_plan({})
    await engine.open(plan)

    def broken(*args):
        raise RuntimeError("the kernel said no\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "run_chunk", broken)
        with pytest.raises(EngineFailed, match=r"^RuntimeError: the kernel said no$"):
            await finish(engine.run(chunk(plan)))
    await engine.close(plan.session_id)
    again = session_plan({}, session_id="again")
    await engine.open(again)
    assert (await finish(engine.run(chunk(again)))).num_frames == 9


async def test_a_session_that_cannot_fit_is_refused_with_numbers(engine, session_plan, monkeypatch):
    """Too little memory names what is needed, what is free and a window that fits, before anything is allocated."""
    plan = session_plan({})
    needed = plan_memory(engine._pipeline, plan)
    monkeypatch.setattr("lingbot_rt.engine.memory.available_host_bytes", lambda: needed.total_bytes - 1)
    with pytest.raises(CapacityError, match=r"window 9 at 64x64 needs .* GB, .* GB is free: use window <= 8"):
        await engine.open(plan)
    monkeypatch.setattr("lingbot_rt.engine.memory.available_host_bytes", lambda: 0)
    with pytest.raises(CapacityError, match="use a smaller size"):
        await engine.open(plan)


async def test_upscaling_and_interpolation_count_in_what_a_session_needs(engine, session_plan, monkeypatch):
    """What fits alone may not fit with larger frames; the refusal says what they take."""
    both = PostprocessPlan(upscaling_scale=4, interpolation_exp=1)
    alone, larger = session_plan({}), session_plan({}, postprocess=both)
    needed = [plan_memory(engine._pipeline, plan) for plan in (alone, larger)]
    processor = engine._pipeline.open_postprocessor(larger)
    assert needed[1].total_bytes - needed[0].total_bytes == processor.memory_bytes() > 0
    monkeypatch.setattr("lingbot_rt.engine.memory.available_host_bytes", lambda: needed[0].total_bytes)
    with pytest.raises(CapacityError, match="or do without upscaling and interpolation"):
        await engine.open(larger)
    await engine.open(alone)


def test_warm_up_meets_every_length_of_the_interactive_window(pipeline, monkeypatch):
    """With a sink that is no multiple of a chunk its lengths are none of those of a growing window: they run too."""
    info = dataclasses.replace(pipeline.model_info, default_size=FrameSize(64, 64), sink_frames=1, window_frames=20)
    small, visible, shares = dataclasses.replace(pipeline, model_info=info), [], []
    run_chunk = warmup.run_chunk

    def recorded(*args):
        result = run_chunk(*args)
        visible.append(result.window_frames)
        return result

    monkeypatch.setattr(warmup, "run_chunk", recorded)
    warm_up(small, shares.append)
    assert visible[:11] == [3, 6, 9, 12, 15, 18, 20, 20, 7, 16, 20]
    assert shares[-1] == 1


def test_warm_up_includes_the_networks_when_asked(pipeline):
    """--enable-upscaling-warmup loads and runs upscaling and interpolation: the first session that asks finds them."""
    networks = PostprocessNetworks(pipeline.device)
    small = dataclasses.replace(pipeline.model_info, default_size=FrameSize(64, 64))
    pipeline = dataclasses.replace(pipeline, model_info=small, postprocess=networks)
    both = PostprocessPlan(upscaling_scale=2, interpolation_exp=2)
    warm_up(pipeline, lambda done: None)
    assert not networks.loaded(both)
    warm_up(pipeline, lambda done: None, postprocess=True)
    assert networks.loaded(both)


async def test_a_network_that_is_missing_is_named_with_the_command(engine, session_plan, monkeypatch, tmp_path):
    """Without the shipped weights a session that asks for them hears which command fetches them, and others go on."""
    monkeypatch.setattr(loader, "WEIGHTS", tmp_path)
    monkeypatch.setattr(loader, "SHIPPED_UPSCALER", tmp_path / "upscaler.safetensors")
    with pytest.raises(InvalidInit, match="run scripts/fetch_models") as refused:
        await engine.open(session_plan({}, postprocess=PostprocessPlan(upscaling_scale=2)))
    assert refused.value.field == "enable_upscaling"
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    broken = PostprocessPlan(upscaling_scale=2, interpolation_exp=1, interpolation_model=tmp_path / "broken.pth")
    monkeypatch.undo()
    with pytest.raises(InvalidInit, match="damaged") as refused:
        await engine.open(session_plan({}, postprocess=broken))
    assert refused.value.field == "frame_interpolation_model_path"
    await engine.open(session_plan({}))


def test_window_bytes_of_the_14b():
    """The 14B's window costs 1.278 GB per latent frame at 832x480 in bf16."""
    config = DiTConfig(num_layers=40, num_attention_heads=40, attention_head_dim=128)
    assert window_bytes(config, FrameSize(832, 480), 1, torch.bfloat16) == 1_277_952_000


def test_cuda_without_cuda_is_one_clear_error(monkeypatch):
    """--device cuda on a machine without one says what to do."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="use --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_the_vae_is_bfloat16_on_a_gpu_only():
    """Unless --vae-dtype says otherwise."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert resolve_dtype(ServeConfig().vae_dtype, gpu) == torch.bfloat16
    assert resolve_dtype(ServeConfig().vae_dtype, cpu) == torch.float32
    assert resolve_dtype(ServeConfig(vae_dtype="float32").vae_dtype, gpu) == torch.float32


def test_placement_keeps_an_offloaded_network_on_the_cpu_between_visits(monkeypatch):
    """An offloaded network is on its device inside on_device only, also when the work raises."""

    class Network:
        device = torch.device("meta")

        def to(self, device):
            self.device = device
            return self

    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    network, device = Network(), torch.device("cuda", 0)
    placement = Placement(network, device, offload=True)
    assert network.device.type == "cpu"

    def visit():
        with placement.on_device():
            assert network.device == device
            raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        visit()
    assert network.device.type == "cpu"
    resident = Network()
    Placement(resident, device, offload=False)
    assert resident.device == device


def test_deterministic_noise_repeats(pipeline, session_plan):
    """Two sessions of one seed draw the same noise, of another seed another."""
    first, second, other = (SessionState(pipeline, session_plan({}, seed=seed)) for seed in (7, 7, 8))
    draws = [session.draw((1, 16, 3, 8, 8)).numpy() for session in (first, second, other)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
