"""A window that is computed again for a new prompt: what its chunks get, in which order, and when."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.dmd import ChunkForward
from lingbot_rt.engine.flow_match import CLEAN
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models.dit import CausalDiT
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan

NEW = "A storm at sea, dark clouds."
KEYS = (("w",), ("w", "l"), ("d",))
F = 3


class Walk:
    """A session whose camera moves otherwise in every chunk. ``lenses``: by chunk, where it is not the model's own."""

    def __init__(self, pipeline, plan, lenses=None) -> None:
        self.pipeline, self.plan, self.index, self.camera = pipeline, plan, 0, CameraPath()
        self.lenses = lenses or {}
        self.session, self.poses = SessionState(pipeline, plan), []

    def step(self, prompt: str | None = None, *, recache: bool = False) -> np.ndarray:
        self.poses.append(self.camera.extend((KEYS[self.index % 3],) * F))
        groups = []
        chunk = ChunkPlan(self.plan.session_id, self.index, prompt or self.plan.prompt, self.poses[-1], None)
        lens = self.lenses.get(self.index)
        run_chunk(
            self.pipeline, self.session, dataclasses.replace(chunk, recache=recache, intrinsics=lens), groups.append
        )
        self.index += 1
        return np.concatenate([group.pixels for group in groups])


@pytest.fixture
def passes(monkeypatch) -> list[list[int]]:
    """A list to append a list to: it gets the first latent frames of context passes, of each chunk of the session."""
    seen: list[list[int]] = []

    def recorded(self, latents):
        seen[-1].append(self.start_frame)
        again(self, latents)

    def own(self, latents):
        seen[-1].append(self.start_frame)
        commit(self, latents)

    again, commit = ChunkForward.commit_again, ChunkForward.commit
    monkeypatch.setattr(ChunkForward, "commit_again", recorded)
    monkeypatch.setattr(ChunkForward, "commit", own)
    return seen


def window_of(cache: KVCache) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """K/V [tokens, H, D] of each layer, by absolute frame."""
    found = {}
    tokens = cache._tokens_per_frame
    for slot, frame in enumerate(cache.frame_of_slot):
        if frame is not None:
            found[frame] = [
                tuple(side[0, slot * tokens : (slot + 1) * tokens].clone() for side in layer)
                for layer in cache._kv_LSBNHD
            ]
    return found


@torch.inference_mode()
def by_hand(walk: Walk, window: dict, chunk: int, latents: torch.Tensor, prompt: str) -> dict:
    """The K/V of a chunk's frames that are in ``window``, from a context pass of these alone over those before them."""
    pipeline, plan = walk.pipeline, walk.plan
    frames = [frame for frame in range(chunk * F, chunk * F + F) if frame in window]
    cut = slice(frames[0] - chunk * F, frames[-1] - chunk * F + 1)
    config = pipeline.dit.config
    cache = KVCache(
        num_layers=config.num_layers, num_heads=config.num_attention_heads, head_dim=config.attention_head_dim,
        tokens_per_frame=plan.size.tokens_per_frame, sink_frames=0, window_frames=99, dtype=torch.float32,
        device=pipeline.device,
    )  # fmt: skip
    earlier = sorted(frame for frame in window if frame < frames[0])
    for place, frame in enumerate(earlier):
        cache.begin(place, 1)
        for layer, (k, v) in enumerate(window[frame]):
            cache.write(layer, k[None], v[None])
    # The cache only counts: RoPE has the true frames.
    cache.begin = lambda start, count: KVCache.begin(cache, len(earlier), count)
    rays = ray_map(walk.poses[chunk][cut], plan.size, pipeline.device)
    channels = torch.cat([latents, walk.session.condition(chunk)], dim=1)[:, :, cut]
    text_kv, camera = pipeline.text_kv(prompt), pipeline.dit.camera_modulation(rays)
    pipeline.dit(channels, CLEAN, text_kv, camera, cache, frames[0], commit=True)
    made = window_of(cache)
    return {frame: made[len(earlier) + i] for i, frame in enumerate(frames)}


def test_the_same_prompt_changes_nothing(pipeline, session_plan):
    """In a window that has not slid each chunk is computed again exactly as it was: latents, condition, camera, RoPE
    and what it sees are those of its own context pass. What the newest chunks get from the camera is not touched."""
    lenses = {2: np.tile([60.0, 55.0, 30.0, 33.0], (F, 1))}
    plain, again = (Walk(pipeline, session_plan({}, window_frames=30, num_steps=2), lenses) for _ in range(2))
    for index in range(8):
        expected = plain.step()
        assert np.abs(again.step(recache=index == 4).astype(int) - expected).max() <= 1
    got, expected = window_of(again.session.cache), window_of(plain.session.cache)
    assert sorted(got) == sorted(expected) == list(range(24))
    for frame, layers in got.items():
        for ours, theirs in zip(layers, expected[frame], strict=True):
            assert all((a - b).abs().max() <= 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("sink", "window"), [(3, 15), (1, 11)])
def test_each_chunk_is_computed_as_by_hand(pipeline, session_plan, sink, window):
    """One chunk per chunk of the session, with the new text and over what the window then holds before its end; also
    one of which a part has left the window. The others stay as they were."""
    walk = Walk(pipeline, session_plan({}, sink_frames=sink, window_frames=window, num_steps=1))
    for _ in range(6):
        walk.step()
    computed = 0
    for index in range(6, 10):
        before = window_of(walk.session.cache)
        if index == 6:
            walk.session.text_kv(NEW)
            walk.session.recache.begin(walk.session.history.window())
        past = walk.session.recache.next()
        if past is None:
            continue
        walk.session.recache._pending.appendleft(past)
        expected = by_hand(walk, before, past.index, past.latents, NEW)
        walk.step(NEW)
        after = window_of(walk.session.cache)
        for frame in after.keys() & before.keys():
            for layer, (ours, old) in enumerate(zip(after[frame], before[frame], strict=True)):
                made = expected[frame][layer] if frame in expected else old
                assert all((a - b).abs().max() <= 1e-4 for a, b in zip(ours, made, strict=True))
                if frame in expected and layer > 0:
                    assert (ours[0] - old[0]).abs().max() > 1e-2
        computed += 1
    assert computed >= 3


def test_the_sink_comes_first_then_the_newest(pipeline, session_plan, passes):
    """One context pass more per chunk, until nothing old is left: chunks that have left the window are passed over.
    The negative prompt's window is left alone."""
    plan = session_plan({}, sink_frames=4, window_frames=16, num_steps=1, guidance_scale=2.0)
    walk = Walk(pipeline, plan)
    done = []
    for index in range(12):
        passes.append([])
        before = window_of(walk.session.negative.cache)
        walk.step(NEW if index >= 7 else None, recache=index == 7)
        done.append(passes[-1])
        after = window_of(walk.session.negative.cache)
        assert all(torch.equal(after[frame][1][0], before[frame][1][0]) for frame in after.keys() & before.keys())
    assert done[6] == [18]
    # The sink has frames of chunks 0 and 1. In the ring are chunks 3 to 6, and one leaves with every chunk.
    assert done[7:] == [[0, 21], [3, 24], [18, 27], [30], [33]]


def test_a_newer_prompt_ends_it(pipeline, session_plan, passes):
    """A prompt without recache stops what is left of the one before; a new one with it begins anew."""
    walk = Walk(pipeline, session_plan({}, window_frames=30, num_steps=1))
    for index, (prompt, recache) in enumerate(
        [(None, False)] * 4 + [("B", True), ("C", False), ("D", True), ("D", False)]
    ):
        passes.append([])
        walk.step(prompt, recache=recache)
        assert len(passes[-1]) == (2 if index in (4, 6, 7) else 1)
    assert len(walk.session.history.window()) == 8


def test_what_is_kept_is_as_long_as_the_window(pipeline, session_plan):
    """The latents of chunks that have left the window are dropped, and a closed session keeps none."""
    pipeline = dataclasses.replace(pipeline, history_bytes=0)
    walk = Walk(pipeline, session_plan({}, sink_frames=1, window_frames=6, num_steps=1))
    for index in range(8):
        walk.step()
        kept = [chunk.index for chunk in walk.session.history.window()]
        assert kept == sorted({0, *range(max(index - 1, 0), index + 1)})
        assert walk.session.history.nbytes == sum(chunk.nbytes for chunk in walk.session.history.window())
    walk.session.release()
    assert (walk.session.history.newest, walk.session.history.nbytes) == (None, 0)


def test_one_camera_modulation_is_held_at_a_time(pipeline, session_plan, monkeypatch):
    """Gigabytes in the 14B: that of a chunk computed again, and then the chunk's own, are written over the last one."""
    made: list[int] = []
    blocks: list[weakref.ref[torch.Tensor]] = []

    def counted(self, rays, into):
        if into is None:
            return compute(self, rays)
        blocks.clear()
        modulation = compute(self, rays, into)
        assert len(blocks) == len(modulation)
        made.append(modulation[0][0].data_ptr())
        return modulation

    def counted_of_block(block, camera):
        assert sum(each() is not None for each in blocks) <= 1, "more than one block's is held beside those kept"
        pair = of_block(block, camera)
        blocks.append(weakref.ref(pair[0]))
        return pair

    of_block = pipeline.dit._camera_modulation
    monkeypatch.setattr(pipeline.dit, "_camera_modulation", counted_of_block)

    compute = CausalDiT.camera_modulation
    monkeypatch.setattr(CausalDiT, "camera_modulation", counted)
    walk = Walk(pipeline, session_plan({}, window_frames=18, num_steps=1))
    for index in range(5):
        walk.step(NEW if index >= 3 else None, recache=index == 3)
    assert len(made) == 5 + 2 - 1  # the first is the one that is kept
    assert len(set(made)) == 1
