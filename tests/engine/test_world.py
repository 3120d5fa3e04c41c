"""Sessions of the engine that go back, become files, and leave the device for each other."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.torch import load, save

from lingbot_rt.engine import engine as engine_module
from lingbot_rt.engine.engine import Engine
from lingbot_rt.errors import CapacityError, EngineFailed, InvalidEvent, InvalidInit
from lingbot_rt.session.plan import Rewound
from lingbot_rt.session.world_file import header_of, read_world
from tests.engine.test_going_back import plans, same

CHUNKS = 7
SLIDING = {"window_frames": 9, "num_steps": 1}


@pytest.fixture(params=[False, True], ids=["latents", "keys and values"])
async def engine(request, golden_config):
    engine = Engine(dataclasses.replace(golden_config, snapshot_kv=request.param))
    await engine.start()
    yield engine
    await engine.stop()


async def run(engine, plan, first: int, end: int = CHUNKS) -> list[np.ndarray]:
    made = []
    for each in plans(plan)[first:end]:
        made.append(np.concatenate([group.pixels async for group in engine.run(each)]))
    return made


@pytest.fixture
def exact(engine) -> bool:
    return engine._config.snapshot_kv


async def test_a_session_goes_on_from_its_file(engine, session_plan, exact):
    """In another session, and from any place. Bit for bit with K/V in it, or while the window has not slid."""
    plan = session_plan({}, **SLIDING)
    await engine.open(plan)
    expected = await run(engine, plan, 0, 2)
    early = await engine.snapshot(plan.session_id, '{"note": "early"}')
    expected += await run(engine, plan, 2, 5)
    late = await engine.snapshot(plan.session_id, "")
    expected += await run(engine, plan, 5)
    await engine.close(plan.session_id)

    other = dataclasses.replace(plan, session_id="other", prompt="Not asked for.")
    assert await engine.open(other, early) == Rewound(2, 0, True)
    other_plans = dataclasses.replace(plan, session_id="other")
    assert same(await run(engine, other_plans, 2), expected[2:])
    await engine.close("other")
    assert await engine.open(other, late) == Rewound(5, 0, exact)
    again = await run(engine, other_plans, 5)
    assert same(again, expected[5:]) == exact
    assert again[0].shape == expected[5].shape

    file = read_world(early)
    assert (file.about, file.chunk_index) == ('{"note": "early"}', 2)
    assert np.array_equal(file.first_frame, plan.first_frame)
    assert len(late) < 2e5 or exact


async def test_a_session_goes_back(engine, session_plan, exact):
    plan = session_plan({}, **SLIDING)
    await engine.open(plan)
    expected = await run(engine, plan, 0)
    assert await engine.rewind(plan.session_id, 2, 0, False) == Rewound(2, 0, True)
    assert same(await run(engine, plan, 2), expected[2:])
    assert await engine.rewind(plan.session_id, 6, 0, True) == Rewound(6, 1, exact)
    with pytest.raises(InvalidEvent, match="9, kept of branch 0 are 0 to 7"):
        await engine.rewind(plan.session_id, 9, 0, False)
    assert same(await run(engine, plan, 6), expected[6:]) == exact
    with pytest.raises(EngineFailed, match="not open"):
        await engine.rewind("nobody", 0, 0, False)


def damaged(kind: str, data: bytes) -> bytes:
    tensors, texts = dict(load(data)), header_of(data)
    world = json.loads(texts["world"])
    if kind == "cut":
        return data[:-1000]
    if kind == "picture":
        return b"\x89PNG" + data
    if kind == "no latents":
        del tensors["chunk.1.latents"]
    if kind == "other shape":
        tensors["chunk.1.latents"] = tensors["chunk.1.latents"][..., :-1].contiguous()
    if kind == "not finite":
        tensors["chunk.1.relative_poses"][0, 0, 0] = float("nan")
    if kind == "no random state":
        tensors["chunk.2.random_state"].zero_()
    if kind == "a chunk less":
        world["chunks"].pop()
    if kind == "far away":
        world["chunk_index"] = 2**70
    if kind == "no chunks":
        del world["chunks"]
    if kind == "long prompt":
        world["chunks"][0]["prompt"] = "a" * 10**5
    if kind == "format":
        texts["format"] = "other"
    return save(tensors, texts | {"world": json.dumps(world)})


KINDS = ["cut", "picture", "no latents", "other shape", "not finite", "a chunk less", "far away", "no chunks"]


async def test_a_file_that_does_not_fit_is_refused(engine, session_plan, exact):
    """By name, before anything is opened, and the next session runs."""
    plan = session_plan({}, **SLIDING)
    await engine.open(plan)
    await run(engine, plan, 0, 3)
    data = await engine.snapshot(plan.session_id, "")
    await engine.close(plan.session_id)
    for kind in (*KINDS, "long prompt", "format", "no random state"):
        with pytest.raises(InvalidInit, match="the snapshot") as caught:
            await engine.open(plan, damaged(kind, data))
        assert caught.value.field == "resume", kind
    wider = dataclasses.replace(plan, window_frames=12)
    with pytest.raises(InvalidInit, match="of another session: window_frames 9, expected 12"):
        await engine.open(wider, data)
    weights = json.loads(header_of(data)["world"])["model"]["weights"]
    assert len(weights) == 16
    other = data.replace(weights.encode(), b"0" * 16)
    with pytest.raises(InvalidInit, match=f"of another model: weights {'0' * 16}, expected {weights}"):
        await engine.open(plan, other)
    elsewhere = data.replace(b'\\"device\\": \\"cpu', b'\\"device\\": \\"gpu')
    assert (await engine.open(plan, elsewhere)).exact is False
    await run(engine, plan, 3, 4)


@pytest.mark.parametrize("engine", [False], indirect=True)
async def test_sessions_make_room_for_each_other(engine, session_plan, monkeypatch):
    """With room for one, three take turns. Each gets the frames that it gets alone."""
    moves = []
    move = engine._move

    def counted(session_id, to_host):
        moves.append((session_id, to_host))
        move(session_id, to_host)

    monkeypatch.setattr(engine._residency, "_move", counted)
    monkeypatch.setattr(engine_module, "fits", lambda *args: not engine._residency._on_device)
    all_plans = [session_plan({}, session_id=name, seed=seed, **SLIDING) for seed, name in enumerate("abc")]
    expected = []
    for plan in all_plans:
        await engine.open(plan)
        expected.append(await run(engine, plan, 0, 4))
        await engine.close(plan.session_id)
    assert moves == []
    for plan in all_plans:
        await engine.open(plan)
    assert moves == [("a", True), ("b", True)]
    got = [[], [], []]
    for index in range(4):
        for frames, plan in zip(got, all_plans, strict=True):
            frames += await run(engine, plan, index, index + 1)
    assert all(same(ours, alone) for ours, alone in zip(got, expected, strict=True))
    assert len(moves) > 12
    assert engine._residency.on_host == {"a", "b"}
    assert await engine.park("c") > 10_000
    await engine.close("a")
    await run(engine, all_plans[1], 4, 5)
    assert moves[-2:] == [("c", True), ("b", False)]
    monkeypatch.setattr(engine_module, "require_room", _no_room)
    with pytest.raises(CapacityError):
        await engine.open(session_plan({}, session_id="d", **SLIDING))


def _no_room(pipeline, plan, coordinator):
    raise CapacityError("full")
