"""Sessions of the engine that go back, become files, and leave the device for each other."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from lingbot_rt.engine import memory
from lingbot_rt.engine.engine import Engine
from lingbot_rt.engine.session_state import SessionState
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
    # What the decoder kept of the chunks before the newest one is not in the file.
    assert await engine.rewind("other", 1, 0, False) == Rewound(1, 0, True)
    assert same(await run(engine, other_plans, 1, 3), expected[1:3])
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
    engine._sessions[plan.session_id].history._limit_bytes = 0
    newest = await engine.rewind(plan.session_id, 7, 1, False)
    assert newest == Rewound(7, 1, exact, kept_from=7)
    with pytest.raises(EngineFailed, match="not open"):
        await engine.rewind("nobody", 0, 0, False)


@pytest.mark.parametrize("engine", [False], indirect=True)
async def test_weights_are_read_once(engine, session_plan, monkeypatch):
    """What the model is was found out when it was loaded: no snapshot holds up the engine for it."""
    plan = session_plan({}, **SLIDING)
    monkeypatch.setattr("hashlib.sha256", None)
    await engine.open(plan)
    await run(engine, plan, 0, 1)
    data = await engine.snapshot(plan.session_id, "")
    await engine.open(dataclasses.replace(plan, session_id="other"), data)


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
    if kind == "other numbers":
        tensors["chunk.0.latents"] = tensors["chunk.0.latents"].double()
    if kind == "latents not finite":
        tensors["chunk.2.latents"][0, 3, 1, 2, 2] = float("inf")
    whole = world["chunks"][-1].get("whole", {"frame_of_slot": [None] * 9}) if world.get("chunks") else {}
    if kind == "short keys":
        tensors["chunk.2.kv.7.0"] = tensors["chunk.2.kv.7.0"][:, :, :, 1:].contiguous()
    if kind == "keys in bfloat16":
        tensors["chunk.0.kv.1.0"] = tensors["chunk.0.kv.1.0"].bfloat16()
    if kind == "a key less":
        del tensors["chunk.1.kv.4.0"]
    if kind == "a frame less":
        whole["kv"].remove(8)
    if kind == "wide features":
        tensors["chunk.2.features.3"] = torch.zeros(1, 12, 2, 8, 9)
    if kind == "a slot of features less":
        whole["features"].pop()
    if kind == "frames elsewhere":
        whole["frame_of_slot"] = whole["frame_of_slot"][::-1]
    if kind == "a slot less":
        whole["frame_of_slot"].pop()
    return save(tensors, texts | {"world": json.dumps(world)})


KINDS = {
    "cut": "cannot be read: damaged",
    "picture": "cannot be read: damaged|its header has",
    "no latents": r"chunk\.1\.latents is missing, expected float32 or bfloat16 or float16 \[1, 16, 3, 8, 8\]$",
    "other shape": r"chunk\.1\.latents is float32 \[1, 16, 3, 8, 7\], expected .* \[1, 16, 3, 8, 8\]$",
    "other numbers": r"chunk\.0\.latents is float64 \[1, 16, 3, 8, 8\], expected float32 or ",
    "latents not finite": r"chunk\.2\.latents has values that are not finite",
    "not finite": r"chunk\.1\.relative_poses has values that are not finite",
    "a chunk less": "is damaged",
    "far away": "is damaged",
    "no chunks": "is damaged",
    "long prompt": "is damaged",
    "format": "its format is 'other', expected",
    "no random state": r"chunk\.2\.random_state is not that of a noise generator",
}
WITH_KV = {
    "short keys": r"chunk\.2\.kv\.7\.0 is float32 (\[\d, 2, 1, )15, .*, expected float32 \1 ?16, ",
    "keys in bfloat16": r"chunk\.0\.kv\.1\.0 is bfloat16 (\[.*\]), expected float32 \1$",
    "a key less": r"chunk\.1\.kv\.4\.0 is missing, expected float32 \[",
    "a frame less": "has frame 8, of which there are no keys and values",
    "wide features": r"chunk\.2\.features\.3 is float32 (\[1, 12, 2, 8), 9\], expected float32 \1, 8\]$",
    "a slot of features less": r"chunk\.2\.features has 24 slots, expected those of this model's decoder",
    "frames elsewhere": r"has frame \d in slot \d, where it cannot be",
    "a slot less": "has 8 slots, expected 9",
}


async def test_a_file_that_does_not_fit_is_refused(engine, session_plan, exact):
    """By name, before anything is opened, and the next session runs."""
    plan = session_plan({}, **SLIDING)
    await engine.open(plan)
    await run(engine, plan, 0, 3)
    data = await engine.snapshot(plan.session_id, "")
    await engine.close(plan.session_id)
    for kind, text in (KINDS | (WITH_KV if exact else {})).items():
        with pytest.raises(InvalidInit, match=f"^the snapshot .*(?:{text})") as caught:
            await engine.open(plan, damaged(kind, data))
        assert caught.value.field == "resume", kind
    assert not engine._sessions
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
    planned, plan_memory = [], memory.plan_memory

    def counted_plan(pipeline, plan):
        planned.append(plan.session_id)
        return plan_memory(pipeline, plan)

    monkeypatch.setattr(memory, "plan_memory", counted_plan)
    free = 10**12
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0 if engine._residency._on_device else free)
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
    assert planned == ["a", "b", "c"] * 2
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
    free = 0
    with pytest.raises(CapacityError, match=r"0\.0 GB is free: use a smaller size"):
        await engine.open(session_plan({}, session_id="d", **SLIDING))


@pytest.mark.parametrize("engine", [False], indirect=True)
async def test_turns_need_host_memory(engine, session_plan, monkeypatch):
    """Where the host has no room for what would have to leave the device, the newcomer is refused, and nobody moves."""
    first, second = (session_plan({}, session_id=name, **SLIDING) for name in "ab")
    await engine.open(first)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0 if engine._residency._on_device else 10**12)
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 10**6)
    monkeypatch.setattr(SessionState, "missing_host_bytes", 2 * 10**9)
    with pytest.raises(CapacityError, match=r"window 9 at 64x64 .* 2\.0 GB of host memory, 0\.0 GB is free"):
        await engine.open(second)
    assert not engine._residency.on_host
    assert len(await run(engine, first, 0, 1)) == 1
    await engine.close("a")
    await engine.open(second)
