"""The first session of a size on compiled code: it compiles before it opens, once, within a limit.

Compilation itself is left out: the engine is told that its networks are compiled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from lingbot_rt.engine import engine as engine_module
from lingbot_rt.engine import warmup
from lingbot_rt.engine.engine import Engine
from lingbot_rt.errors import CapacityError
from lingbot_rt.session.plan import ChunkPlan
from lingbot_rt.shapes import FrameSize

LIMIT_S = 60
NEW, OWN = FrameSize(96, 64), FrameSize(64, 64)


@pytest.fixture
async def engine(golden_config):
    engine = Engine(golden_config)
    await engine.start()
    info = dataclasses.replace(engine._pipeline.model_info, compiled=True)
    engine._pipeline = dataclasses.replace(engine._pipeline, model_info=info)
    engine._compiled = (engine_module.Shape(OWN, info.latent_frames),)
    yield engine
    await engine.stop()


@pytest.fixture
def warmed(monkeypatch):
    """The chunks of warm-ups as (size, latent frames, index, with camera); ``before`` of the second is called first."""
    seen = []

    def recorded(pipeline, session, plan, emit):
        seen.append((session.plan.size, session.plan.latent_frames, plan.chunk_index, plan.relative_poses is not None))
        recorded.before()
        return run_chunk(pipeline, session, plan, emit)

    run_chunk, recorded.before = warmup.run_chunk, lambda: None
    monkeypatch.setattr(warmup, "run_chunk", recorded)
    return seen, recorded


@pytest.fixture
def new_plan(session_plan):
    def build(session_id: str = "new", **changes):
        picture = np.random.default_rng(3).integers(0, 256, (NEW.height, NEW.width, 3), np.uint8)
        return session_plan({}, session_id=session_id, **{"size": NEW, "first_frame": picture} | changes)

    return build


async def frames_of(engine, plan) -> np.ndarray:
    """The first chunk of a session that opens, plays and closes."""
    await engine.open(plan)
    run = engine.run(ChunkPlan(plan.session_id, 0, plan.prompt, None, None))
    frames = np.concatenate([group.pixels async for group in run])
    await engine.close(plan.session_id)
    return frames


async def test_a_new_shape_compiles_once_before_its_session_opens(engine, new_plan, warmed):
    """With and without camera, up to a decode of steady shapes; its frames are those of a session that did not have
    to. Each chunk length is a shape of its own; the known size never compiles."""
    seen, _ = warmed
    assert engine.warm_sizes == (OWN,)
    warm_up = engine.warm_up_of(new_plan())
    assert (warm_up.size, warm_up.latent_frames, warm_up.expected_s) == (NEW, 3, None)
    first = await frames_of(engine, new_plan())
    assert seen == [(NEW, 3, 0, True), (NEW, 3, 1, False)]
    assert engine.warm_sizes == (OWN, NEW)
    assert engine.warm_up_of(new_plan()) is None
    assert np.array_equal(await frames_of(engine, new_plan("again")), first)
    await frames_of(engine, new_plan("own", size=OWN, first_frame=new_plan().first_frame[:, :64]))
    assert len(seen) == 2
    single = new_plan("single", latent_frames=1)
    assert engine.warm_up_of(single).expected_s > 0
    await frames_of(engine, single)
    assert [entry[1:] for entry in seen[2:]] == [(1, 0, True), (1, 1, True), (1, 2, True), (1, 3, False)]
    assert engine.warm_sizes == (OWN, NEW)
    assert engine._sessions == {}


async def test_beyond_the_limit_only_that_session_is_refused(engine, new_plan, warmed):
    """The refusal names size, option and a size that is ready. Nothing stays behind, other sizes go on, and the next
    session of that size compiles what is left."""
    _, hook = warmed
    unlimited = engine._config
    engine._config = dataclasses.replace(unlimited, session_warmup_limit_s=0.1)
    hook.before = lambda: engine._warm_up._is_stopped.wait(LIMIT_S)
    with pytest.raises(
        CapacityError, match=r"96x64 with 3 latent .* than 0\.1 s \(--session-warmup-limit-s\).*use 64x64"
    ) as no:
        await engine.open(new_plan())
    assert no.value.field == "size"
    await engine.close("new")
    assert (engine._sessions, engine.warm_sizes, engine.is_lost) == ({}, (OWN,), False)
    hook.before = lambda: None
    await frames_of(engine, new_plan("own", size=OWN, first_frame=new_plan().first_frame[:, :64]))
    engine._config = unlimited
    assert len(await frames_of(engine, new_plan("again"))) == 9
    assert engine.warm_sizes == (OWN, NEW)


@pytest.mark.parametrize("ending", ["the client is gone", "closed"])
async def test_a_session_that_ends_while_it_compiles(engine, new_plan, warmed, ending):
    """The warm-up stops before its next forward, and the next session of that size has one of its own."""
    seen, hook = warmed
    begun, gate = threading.Event(), threading.Event()

    def wait():
        begun.set()
        assert gate.wait(LIMIT_S)

    hook.before = wait
    opening = asyncio.create_task(engine.open(new_plan()))
    await asyncio.to_thread(begun.wait, LIMIT_S)
    if ending == "the client is gone":
        opening.cancel()
        await asyncio.wait({opening})
    closing = asyncio.create_task(engine.close("new"))
    await asyncio.sleep(0)
    gate.set()
    await closing
    await asyncio.wait({opening})
    assert opening.cancelled() or "closed" in str(opening.exception())
    assert len(seen) == 1
    assert (engine._sessions, engine.warm_sizes) == ({}, (OWN,))
    assert len(await frames_of(engine, new_plan("next"))) == 9
    assert len(seen) == 3


async def test_two_sessions_of_a_new_size(engine, new_plan, warmed):
    """The second waits for the first one's warm-up and has none of its own: a size is warm once."""
    await asyncio.gather(engine.open(new_plan("first")), engine.open(new_plan("second")))
    assert len(warmed[0]) == 2
    assert engine.warm_sizes == (OWN, NEW)


async def test_no_more_shapes_are_compiled_than_are_kept(engine, new_plan, warmed, monkeypatch):
    """Further ones run uncompiled, so they open at once."""
    monkeypatch.setattr(engine_module, "COMPILED_SHAPES", 1)
    assert engine.warm_up_of(new_plan()) is None
    assert len(await frames_of(engine, new_plan())) == 9
    assert warmed[0] == []


async def test_a_size_that_does_not_fit_is_refused_before_it_compiles(engine, new_plan, warmed, monkeypatch):
    """Its refusal names memory."""
    monkeypatch.setattr("lingbot_rt.engine.memory.available_host_bytes", lambda: 0)
    with pytest.raises(CapacityError, match="use a smaller size"):
        await engine.open(new_plan())
    assert warmed[0] == []


async def test_the_second_vae_compiles_by_itself(engine, new_plan, warmed):
    """A size that is known for the server's VAE is new for one in bfloat16, once; /v1/models lists it for neither."""
    plan = new_plan(size=OWN, first_frame=np.zeros((64, 64, 3), np.uint8), bfloat16_vae=True)
    assert engine.warm_up_of(dataclasses.replace(plan, bfloat16_vae=False)) is None
    assert engine.warm_up_of(plan) is not None
    await frames_of(engine, plan)
    assert engine.warm_up_of(plan) is None
    assert engine.warm_sizes == (OWN,)
