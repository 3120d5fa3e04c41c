"""Compiled code: once for all blocks, all of it before ready, with the results of the plain path."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from lingbot_rt.engine import compilation
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.compilation import resolve_compile, set_compile_cache
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import warm_up
from lingbot_rt.errors import ConfigError
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan

from .test_placement import CPU, tiny_dit, two_chunks

BACKEND = "inductor" if shutil.which("g++") else "aot_eager"
CHUNKS = 16
NEW_PROMPT_AT, NO_CAMERA_AT = 11, 14


@pytest.fixture
def counters():
    """What torch.compile has done since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@torch.inference_mode()
def frames_of(pipeline: Pipeline, plan, chunks: int) -> list[np.ndarray]:
    """The last frame of each chunk of a session with a new prompt and a chunk without camera on the way."""
    session, camera, newest = SessionState(pipeline, plan), CameraPath(), []
    for index in range(chunks):
        poses = None if index == NO_CAMERA_AT else camera.extend((("w",),) * plan.latent_frames)
        prompt = plan.prompt if index < NEW_PROMPT_AT else "a forest at night"
        groups = []
        run_chunk(pipeline, session, ChunkPlan(plan.session_id, index, prompt, poses, None), groups.append)
        newest.append(groups[-1].pixels[-1].astype(int))
    return newest


def test_nothing_compiles_after_warm_up(small_config, pipeline, session_plan, counters):
    """Sixteen chunks (first one, growing window, sliding window, new prompt, no camera) and a guided session run on
    what warm-up compiled: two versions of one half of a block, one of everything else. The frames are the plain
    path's."""
    compiled = load_pipeline(small_config, lambda status: None)
    compiled.dit.compile_blocks(BACKEND)
    compiled.vae.compile("aot_eager")
    with torch.inference_mode():
        warm_up(compiled, lambda done: None)
    assert counters["stats"]["unique_graphs"] == 5
    plan = session_plan({})
    got = frames_of(compiled, plan, CHUNKS)
    frames_of(compiled, session_plan({}, guidance_scale=3.0, negative_prompt="a dark forest", num_steps=2), 3)
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]
    for index, expected in enumerate(frames_of(pipeline, plan, 12)):
        assert np.abs(got[index] - expected).max() <= 1


def test_forty_blocks_are_not_forty_compilations(counters):
    """The halves are compiled once, however many blocks there are."""
    with torch.inference_mode():
        for num_layers, expected in ((12, 3), (40, 3)):
            dit = tiny_dit(num_layers)
            dit.compile_blocks("aot_eager")
            two_chunks(dit)
            assert counters["stats"]["unique_graphs"] == expected
    assert not counters["graph_break"]


@pytest.mark.skipif(BACKEND != "inductor", reason="no C++ compiler")
def test_compiled_code_is_kept(tmp_path, monkeypatch, counters):
    """A second start finds the code of the first one in the folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # as it was, after the test
    set_compile_cache(str(tmp_path / "kept"))

    def start() -> None:
        torch._dynamo.reset()
        counters.clear()
        x = torch.linspace(0, 1, 77)
        assert torch.allclose(torch.compile(lambda x: x.sin() + x.cos())(x), x.sin() + x.cos())

    start()
    assert any((tmp_path / "kept").rglob("*.so"))
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
    start()
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] >= 1


def test_a_folder_that_cannot_be(tmp_path):
    """A file at the folder's path is one clear error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--compile-cache"):
        set_compile_cache(str(tmp_path / "file"))


def test_when_code_is_compiled(monkeypatch):
    """auto: on a GPU, where compiler and triton are; on a CPU only when asked for, and then with a compiler."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: object())
    assert resolve_compile("auto", gpu)
    assert resolve_compile("true", CPU)
    assert not resolve_compile("auto", CPU)
    assert not resolve_compile("false", gpu)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    assert not resolve_compile("auto", gpu)
    with pytest.raises(ConfigError, match="triton"):
        resolve_compile("true", gpu)
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda *asked: "nowhere")
    with pytest.raises(ConfigError, match=r"Python\.h.*--compile false"):
        resolve_compile("true", CPU)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*--compile false"):
        resolve_compile("true", CPU)


def test_modulation_of_known_timesteps(monkeypatch):
    """A forward with a result of ``time_modulation`` is the forward at that timestep, bit for bit."""
    dit = tiny_dit(1)
    plain = two_chunks(dit)
    beforehand = {timestep: dit.time_modulation(timestep) for timestep in (900.0, 0.0)}
    forward = dit.forward
    monkeypatch.setattr(
        dit, "forward", lambda x, timestep, *args, **more: forward(x, beforehand[timestep], *args, **more)
    )
    assert all(torch.equal(got, expected) for got, expected in zip(two_chunks(dit), plain, strict=True))
