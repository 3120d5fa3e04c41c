"""What a chunk promises beyond the golden sessions: chunk lengths, guidance, steps, interleaving, cancellation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lingbot_rt.engine import session_state
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.memory import plan_memory, weight_bytes
from lingbot_rt.engine.pipeline import load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import ChunkCancelled
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, FrameGroup
from lingbot_rt.shapes import pixel_frames_of_chunk


class Walk:
    """One session driven by hand: ``step`` runs the next chunk and returns its frames."""

    def __init__(self, pipeline, plan, keys=("w",)):
        self.pipeline, self.plan, self.keys = pipeline, plan, keys
        self.session, self.camera, self.index = SessionState(pipeline, plan), CameraPath(), 0
        self.results, self.groups = [], []

    def step(self, prompt: str | None = None, recent: int | None = None) -> np.ndarray:
        poses = self.camera.extend(((self.keys),) * self.plan.latent_frames)
        chunk = ChunkPlan(
            self.plan.session_id, self.index, prompt or self.plan.prompt, poses, None, recent_frames=recent
        )
        self.groups = []
        self.results.append(run_chunk(self.pipeline, self.session, chunk, self.groups.append))
        self.index += 1
        return np.concatenate([group.pixels for group in self.groups])


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5])
def test_frames_a_chunk_follow_num_frames(pipeline, session_plan, latent_frames):
    """F latent frames per chunk give 4 (F - 1) + 1 pixel frames first and 4 F after, one group per latent frame."""
    walk = Walk(pipeline, session_plan({}, latent_frames=latent_frames, window_frames=3 + 2 * latent_frames))
    for index in range(3):
        frames = walk.step()
        assert len(frames) == pixel_frames_of_chunk(index, latent_frames)
        assert [group.group_index for group in walk.groups] == list(range(latent_frames))
        assert frames.shape[1:] == (64, 64, 3)


@torch.inference_mode()
def test_a_camera_that_failed_leaves_none_behind(pipeline, session_plan, monkeypatch):
    """The keys of the chunk before have a modulation again, not none."""
    session, path = SessionState(pipeline, session_plan({})), CameraPath()
    path.extend((("w",),) * 3)
    walked = path.extend((("w",),) * 3)
    session.camera(walked)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(session_state, "ray_map", None)
        session.camera(path.extend((("w", "l"),) * 3))
    assert session.camera(walked) is not None


def test_window_grows_then_stays(pipeline, session_plan):
    """The visible window grows by a chunk until it is full and is reported with each result."""
    walk = Walk(pipeline, session_plan({}))
    for _ in range(5):
        walk.step()
    assert [result.window_frames for result in walk.results] == [3, 6, 9, 9, 9]


def test_an_interactive_window_is_a_smaller_one_for_as_long_as_it_lasts(pipeline, session_plan):
    """Chunks that see 6 of 18 latent frames, with guidance, are those of a window of 6; then the rest is seen again.
    The memory is that of the whole window."""
    changes = {"guidance_scale": 2.0, "num_steps": 2, "sink_frames": 1}
    small = Walk(pipeline, session_plan({}, window_frames=6, **changes))
    limited = Walk(pipeline, session_plan({}, window_frames=18, recent_frames=(2, 9), **changes))
    for _ in range(5):
        assert np.abs(small.step().astype(int) - limited.step(recent=2)).max() <= 1
    assert [result.window_frames for result in limited.results] == [3, 6, 6, 6, 6]
    for recent, visible in ((9, 13), (None, 18), (2, 6)):
        limited.step(recent=recent)
        assert limited.results[-1].window_frames == visible
    assert np.abs(small.step().astype(int) - limited.step(recent=2)).max() > 1
    assert limited.session.cache.nbytes == 3 * small.session.cache.nbytes


def test_a_session_may_ask_for_a_vae_in_bfloat16(golden_config, pipeline, session_plan):
    """Its frames are those of a server whose VAE is in bfloat16. The sessions beside it keep the server's own."""
    config = dataclasses.replace(golden_config, vae_dtype="bfloat16")
    of_server = load_pipeline(config, lambda status: None)
    own, half, expected = (
        Walk(served, session_plan({}, bfloat16_vae=asked, session_id=str(asked)))
        for served, asked in ((pipeline, False), (pipeline, True), (of_server, False))
    )
    for _ in range(2):
        plain, asked = own.step(), half.step()
        assert np.array_equal(asked, expected.step())
        assert 0 < np.abs(plain.astype(int) - asked).mean() < 1
    assert of_server.half_vae is None
    again = Walk(of_server, session_plan({}, bfloat16_vae=True))
    assert np.array_equal(again.step(), Walk(pipeline, session_plan({}, bfloat16_vae=True)).step())


def test_the_second_vae_counts_until_it_is_there(golden_config, session_plan):
    """What the first session that asks for it needs has its weights; the VAE's own part is half as large."""
    pipeline = load_pipeline(golden_config, lambda status: None)
    own, asked = session_plan({}), session_plan({}, bfloat16_vae=True)
    needed = plan_memory(pipeline, asked)
    assert needed.vae_bytes == weight_bytes(pipeline.vae._vae) // 2
    assert needed.opening_bytes < plan_memory(pipeline, own).opening_bytes
    SessionState(pipeline, asked)
    later = plan_memory(pipeline, asked)
    assert later.vae_bytes == plan_memory(pipeline, own).vae_bytes == 0
    assert needed.total_bytes == later.total_bytes + needed.vae_bytes


def test_held_keys_keep_their_camera(pipeline, session_plan, monkeypatch):
    """Camera modulation is computed for new keys and after a chunk without camera, and not while the same are held."""
    walk, computed = Walk(pipeline, session_plan({}), keys=("w", "l")), []
    modulation = pipeline.dit.camera_modulation
    monkeypatch.setattr(
        pipeline.dit, "camera_modulation", lambda *args: (computed.append(walk.index), modulation(*args))[1]
    )
    for index in range(7):
        walk.keys = ("w",) if index == 4 else ("w", "l")
        walk.step()
    # The session's first pose has none before it, so chunk 1 differs from chunk 0.
    assert computed == [0, 1, 4, 5]
    without = ChunkPlan(walk.plan.session_id, 7, walk.plan.prompt, None, None)
    run_chunk(pipeline, walk.session, without, walk.groups.append)
    walk.index = 8
    walk.step()
    assert computed == [0, 1, 4, 5, 8]


def test_sessions_interleave_without_touching_each_other(pipeline, session_plan):
    """Two sessions run chunk by chunk in turn give the frames that each gives alone."""
    plans = [session_plan({}, session_id="a", seed=1), session_plan({}, session_id="b", seed=2)]
    alone = []
    for plan in plans:
        walk = Walk(pipeline, plan)
        alone.append([walk.step() for _ in range(3)])
    together = [Walk(pipeline, plan) for plan in plans]
    for index in range(3):
        for walk, expected in zip(together, alone, strict=True):
            assert np.array_equal(walk.step(), expected[index])
    assert not np.array_equal(alone[0][0], alone[1][0])


def test_guidance_of_the_same_prompt_changes_nothing(pipeline, session_plan):
    """u + g (c - u) with equal prompts is c: the second branch has a window and text K/V of its own that agree."""
    plain = Walk(pipeline, session_plan({}))
    guided = Walk(pipeline, session_plan({}, guidance_scale=3.0, negative_prompt=plain.plan.prompt))
    for _ in range(3):
        assert np.abs(plain.step().astype(int) - guided.step()).max() <= 1


def test_guidance_against_another_prompt_matters(pipeline, session_plan):
    """A negative prompt that differs moves the picture."""
    plain = Walk(pipeline, session_plan({}))
    guided = Walk(pipeline, session_plan({}, guidance_scale=3.0, negative_prompt="a dark forest"))
    assert np.abs(plain.step().astype(int) - guided.step()).mean() > 1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_step_counts_are_honoured(pipeline, session_plan, steps, monkeypatch):
    """n steps are n denoise forwards and one context forward."""
    calls = []
    forward = type(pipeline.dit).forward

    def counted(self, *args, **kwargs):
        calls.append(kwargs["commit"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.dit), "forward", counted)
    Walk(pipeline, session_plan({}, num_steps=steps)).step()
    assert calls == [False] * steps + [True]


def test_a_cancelled_chunk_stops_before_its_next_forward(pipeline, session_plan):
    """Cancelled while its first frames go out, a chunk hands out no more frames and raises."""
    plan = session_plan({})
    session = SessionState(pipeline, plan)
    seen: list[FrameGroup] = []

    def cancel_at_first(group: FrameGroup) -> None:
        seen.append(group)
        session.cancel()

    with pytest.raises(ChunkCancelled):
        run_chunk(pipeline, session, ChunkPlan(plan.session_id, 0, plan.prompt, None, None), cancel_at_first)
    assert len(seen) == 1


def test_timings_add_up(pipeline, session_plan):
    """The stages are within the chunk's wall time and cover at least 95 % of it."""
    walk = Walk(pipeline, session_plan({}))
    for _ in range(3):
        walk.step()
    shares = []
    for timings in (result.timings for result in walk.results):
        assert min(timings.prepare_ms, timings.dit_ms, timings.vae_ms) > 0
        shares.append((timings.dit_ms + timings.vae_ms + timings.prepare_ms) / timings.total_ms)
    assert max(shares) <= 1
    # The best of three: a busy machine may stop one of them between two stages.
    assert max(shares) >= 0.95
