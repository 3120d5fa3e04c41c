"""Forwards as CUDA graphs give the frames of those that are launched kernel by kernel, bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lingbot_rt.engine import memory
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.memory import plan_memory
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models.captured_forward import CapturedForwards, _Captured
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.interactive_window import recent_frames
from lingbot_rt.session.plan import ChunkPlan

from .conftest import DEVICE, frames_of

pytestmark = pytest.mark.gpu

CHUNKS = 10


@pytest.fixture(scope="module")
def pipelines(gpu_config) -> dict[str, Pipeline]:
    """By ``--cuda-graphs``."""
    return {
        value: load_pipeline(dataclasses.replace(gpu_config, compile="true", cuda_graphs=value), lambda status: None)
        for value in ("false", "auto")
    }


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often forwards were captured and replayed."""
    counts = {"captured": 0, "replayed": 0}

    def count(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def called(*args):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, method, called)

    count(CapturedForwards, "_capture", "captured")
    count(_Captured, "replay", "replayed")
    return counts


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(mine, theirs) for mine, theirs in zip(a, b, strict=True))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_session_is_the_same(pipelines, session_plan, counted, guidance):
    """Ten chunks with a sliding window, a new prompt, and one without camera; then the same session once more."""
    plan = session_plan({}, guidance_scale=guidance)
    expected = frames_of(pipelines["false"], plan, CHUNKS)
    assert counted == {"captured": 0, "replayed": 0}
    assert same(frames_of(pipelines["auto"], plan, CHUNKS), expected)
    # 4 steps and a context pass from chunk 2 on: each kind runs once as it is, with and without camera and guidance.
    branches = 1 if guidance == 1 else 2
    assert counted["captured"] >= 2 * branches
    assert counted["replayed"] >= 5 * 6 * branches
    assert same(frames_of(pipelines["auto"], plan, CHUNKS), expected)


@pytest.mark.parametrize("changes", [{}, {"quantization": "fp8", "kv_cache_dtype": "fp8"}], ids=["bfloat16", "fp8"])
def test_half_precision_is_the_same(gpu_config, session_plan, counted, changes):
    """The golden checkpoint's linears do not divide by 16, so fp8 is of the built-in model."""
    model = {"model_path": "builtin"} if changes else {}
    config = dataclasses.replace(gpu_config, compile="true", dtype="bfloat16", **model, **changes)
    found = []
    for value in ("false", "auto"):
        pipeline = load_pipeline(dataclasses.replace(config, cuda_graphs=value), lambda status: None)
        found.append(frames_of(pipeline, session_plan({}), CHUNKS))
    assert same(*found)
    assert counted["replayed"] > 20


@pytest.mark.usefixtures("ieee")
@torch.inference_mode()
def test_sessions_in_turn(pipelines, session_plan, counted):
    """Two sessions by turns, one of which leaves its GPU on the way, and whose window is narrow in some chunks."""
    found: dict[str, list[np.ndarray]] = {}
    for name, pipeline in pipelines.items():
        plans = [session_plan({}, session_id=f"s{i}", seed=i, window_frames=15) for i in range(2)]
        recents = recent_frames(plans[1].sink_frames, 15, plans[1].latent_frames)
        plans[1] = dataclasses.replace(plans[1], recent_frames=recents)
        sessions, cameras = [SessionState(pipeline, plan) for plan in plans], [CameraPath(), CameraPath()]
        found[name] = []
        for index in range(9):
            for i, session in enumerate(sessions):
                keys = ("w",) if index % 2 else ("w", "l")
                poses = cameras[i].extend((keys,) * plans[i].latent_frames)
                recent = min(recents) if i and index % 3 == 2 else None
                chunk = ChunkPlan(plans[i].session_id, index, plans[i].prompt, poses, None, recent_frames=recent)
                run_chunk(pipeline, session, chunk, lambda group, name=name: found[name].append(group.pixels.copy()))
            if index == 6:
                sessions[0].move(torch.device("cpu"))
                sessions[0].move(DEVICE)
        for session in sessions:
            session.release()
    assert same(found["auto"], found["false"])
    assert counted["replayed"] > 20


def test_graphs_are_dropped_when_a_session_needs_their_memory(pipelines, session_plan, counted, monkeypatch):
    """Theirs does not count as free. A session that fits without them gets it, and the one that goes on is captured
    again, with the same frames."""
    pipeline, plan = pipelines["auto"], session_plan({})
    expected = frames_of(pipeline, plan, 5)
    graphs = pipeline.dit.captured
    taken, needed = graphs.nbytes, plan_memory(pipeline, plan).total_bytes
    assert taken > 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed + taken)
    (room,) = memory.share_room(pipeline, plan)
    assert (room.free, graphs.nbytes) == (needed, taken)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    (room,) = memory.share_room(pipeline, plan)
    assert (room.free, graphs.nbytes) == (needed, 0)
    before = counted["captured"]
    assert same(frames_of(pipeline, plan, 5), expected)
    assert counted["captured"] > before
