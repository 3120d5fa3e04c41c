"""A session that goes back, or moves off its device and returns, goes on as it did before."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.going_back import set_back
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, PostprocessPlan

CHUNKS = 9
KEYS = (("w",), ("w",), ("w", "l"), ("d",))
F = 3


def plans(plan) -> list[ChunkPlan]:
    """Keys that are held for two chunks, a new prompt with recache, a lens, and a window that narrows."""
    camera, made = CameraPath(), []
    for index in range(CHUNKS):
        poses = None if index == 2 else camera.extend((KEYS[index % 4],) * F)
        made.append(
            ChunkPlan(
                plan.session_id,
                index,
                plan.prompt if index < 5 else "A storm at sea.",
                poses,
                None,
                intrinsics=np.tile([60.0, 55.0, 30.0, 33.0], (F, 1)) if index == 4 else None,
                recent_frames=plan.recent_frames[0] if plan.recent_frames and index in (3, 6) else None,
                recache=index == 5,
            )
        )
    return made


class Walk:
    def __init__(self, pipeline, plan) -> None:
        self.pipeline, self.plans, self.session = pipeline, plans(plan), SessionState(pipeline, plan)

    def run(self, first: int, end: int = CHUNKS) -> list[np.ndarray]:
        """The frames of each chunk."""
        made = []
        for index in range(first, end):
            groups = []
            run_chunk(self.pipeline, self.session, self.plans[index], groups.append)
            made.append(np.concatenate([group.pixels for group in groups]))
        return made

    def go_back(self, boundary: int, branch: int = 0, *, keep: bool = False) -> bool:
        window = self.session.history.go_back(branch, boundary, keep=keep)
        return set_back(self.pipeline, self.session, window, boundary)


def same(ours, theirs) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def keeping(pipeline):
    """``keeping(kv=True)`` -> a pipeline whose sessions keep a history."""
    return lambda kv=False, megabytes=64: dataclasses.replace(
        pipeline, history_bytes=int(megabytes * 2**20), keeps_kv=kv
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"sink_frames": 4, "window_frames": 13, "recent_frames": (2, 6)},
        {"sink_frames": 0, "window_frames": 9, "guidance_scale": 2.0},
        {"window_frames": 9, "postprocess": PostprocessPlan(interpolation_exp=1)},
    ],
    ids=["two rings", "guidance", "interpolation"],
)
def test_with_keys_and_values_it_goes_on_bit_for_bit(keeping, session_plan, changes):
    """Whatever the boundary, also after the window has slid and while chunks are still to be computed again."""
    walk = Walk(keeping(kv=True), session_plan({}, num_steps=2, **changes))
    expected = walk.run(0)
    for boundary in (CHUNKS, 7, 6, 3, 0):
        assert walk.go_back(boundary)
        assert same(walk.run(boundary), expected[boundary:])


def test_what_was_computed_again_stays_so(keeping, session_plan):
    """The sink has its new prompt also when the chunk with which it got it has long left the window."""
    plan = session_plan({}, num_steps=1, sink_frames=3, window_frames=9)
    for kv in (True, False):
        walk = Walk(keeping(kv=kv), plan)
        walk.plans = [
            dataclasses.replace(each, prompt="A meadow." if index >= 2 else plan.prompt, recache=index == 2)
            for index, each in enumerate(walk.plans)
        ]
        expected = walk.run(0)
        sinks = [walk.session.cache.read(frame) for frame in range(3)]
        assert walk.go_back(7) == kv
        assert same(walk.run(7), expected[7:]) == kv
        differences = [(walk.session.cache.read(frame) - sinks[frame]).abs().max() for frame in range(3)]
        # From latents it is computed again in another order, and what it saw differs; an old prompt is far away.
        assert max(differences) <= (0 if kv else 0.5), differences


def test_a_session_that_jumps_has_a_history_from_there_on(keeping, session_plan):
    walk = Walk(keeping(), session_plan({}, num_steps=1, window_frames=9))
    walk.run(0, 2)
    walk.plans = [dataclasses.replace(each, chunk_index=each.chunk_index + 500) for each in walk.plans]
    walk.run(0, 6)
    history = walk.session.history
    # Its sink is missing: no window but this one can be computed again.
    assert (history.next_index, history.kept_from()) == (506, 507)
    for boundary in (1, 504):
        with pytest.raises(InvalidEvent, match=f"{boundary}, branch 0 is not kept"):
            walk.go_back(boundary)


def test_until_the_window_slides_it_goes_on_bit_for_bit_from_latents_alone(keeping, session_plan):
    walk = Walk(keeping(), session_plan({}, num_steps=2, window_frames=18, recent_frames=(3, 9)))
    expected = walk.run(0)
    for boundary in (6, 4, 1, 0):
        assert walk.go_back(boundary)
        assert same(walk.run(boundary), expected[boundary:])


def test_after_the_window_has_slid_the_world_is_alike(keeping, session_plan):
    """From latents alone; the session knows. The noise is the same, and the frames are near those of before."""
    walk = Walk(keeping(), session_plan({}, num_steps=2, sink_frames=4, window_frames=13, recent_frames=(2, 6)))
    expected = walk.run(0)
    slots = walk.session.cache.frame_of_slot
    assert not walk.go_back(8)
    again = walk.run(8)
    assert walk.session.cache.frame_of_slot == slots
    difference = np.abs(again[0].astype(int) - expected[8]).mean()
    assert 0 < difference < 0.35 * np.abs(expected[0].astype(int)[-1] - expected[8]).mean()


def test_a_branch_leaves_the_old_line_where_it_is(keeping, session_plan):
    walk = Walk(keeping(kv=True), session_plan({}, num_steps=1, window_frames=9))
    old = walk.run(0, 7)
    assert walk.go_back(3, keep=True)
    assert walk.session.history.branch == 1
    plain, walk.plans = walk.plans, [dataclasses.replace(each, prompt="A meadow.") for each in walk.plans]
    new = walk.run(3, 6)
    assert not same(new, old[3:6])
    assert walk.go_back(7, branch=0)
    walk.plans = plain
    assert walk.go_back(5, branch=0, keep=True)
    assert same(walk.run(5, 7), old[5:])
    walk.plans = [dataclasses.replace(each, prompt="A meadow.") for each in plain]
    assert walk.go_back(4, branch=1)
    assert same(walk.run(4, 6), new[1:])


def test_what_another_branch_has_in_common_outlives_the_branch(keeping, session_plan):
    """Forgetting the end of a line leaves the chunks that other branches go through."""
    walk = Walk(keeping(kv=True), session_plan({}, num_steps=1, window_frames=9))
    old = walk.run(0, 7)
    walk.go_back(5, keep=True)  # 1
    walk.go_back(4, branch=0, keep=True)  # 2
    walk.go_back(2, branch=0)
    walk.run(2, 3)
    assert walk.go_back(5, branch=1)
    assert same(walk.run(5, 7), old[5:])
    assert walk.go_back(4, branch=2)
    assert same(walk.run(4, 7), old[4:])
    with pytest.raises(InvalidEvent, match=r"^4, kept of branch 0 are 0 to 3"):
        walk.go_back(4, branch=0)
    with pytest.raises(InvalidEvent, match=r"^7, expected one of the branches \[0, 1, 2\]"):
        walk.go_back(0, branch=7)


@pytest.mark.parametrize("boundary", [5, 8])
def test_a_boundary_that_left_the_history_is_refused(keeping, session_plan, boundary):
    """What is kept shrinks from its old end, never below the window, and the chunk says from where on it is kept."""
    walk = Walk(keeping(megabytes=0.1), session_plan({}, num_steps=1, sink_frames=3, window_frames=12))
    groups = []
    kept = [run_chunk(walk.pipeline, walk.session, plan, groups.append).kept_from for plan in walk.plans]
    assert kept[0] == kept[3] == 0
    assert kept == sorted(kept)
    history = walk.session.history
    assert kept[-1] == history.kept_from() <= CHUNKS
    one = history.newest.nbytes
    assert history.nbytes <= max(0.1 * 2**20, 5 * one)
    if boundary < kept[-1]:
        with pytest.raises(InvalidEvent, match=f"{boundary}, kept of branch 0 are {kept[-1]} to {CHUNKS}"):
            walk.go_back(boundary)
        assert history.next_index == CHUNKS
    else:
        walk.go_back(boundary)
        walk.run(boundary)


def test_a_session_off_its_device_returns_as_it_was(keeping, session_plan):
    walk = Walk(keeping(), session_plan({}, num_steps=1, window_frames=9, guidance_scale=2.0))
    expected = walk.run(0)
    again = Walk(keeping(), walk.session.plan)
    frames = again.run(0, 5)
    again.session.move(torch.device("cpu"))
    assert same(frames + again.run(5), expected)
