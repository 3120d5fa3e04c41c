"""The metrics are at their best for the renderer itself and worse for worlds that are wrong."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.session.controls import NEUTRAL
from lingbot_rt.shapes import FrameSize
from scripts.world.evaluate import GROUPS, Bar, _group_names, as_markdown, record_walk
from scripts.world.metrics import (
    fit_view,
    full_turn,
    held_out_starts,
    long_rollout,
    obedience,
    picture,
    prompt_switch,
    rollouts,
    standing_still,
    statistics,
)
from scripts.world.render import Renderer
from scripts.world.trajectories import View
from scripts.world.worlds import GroundTruthWorld, Prompt


@pytest.fixture(scope="module")
def renderer():
    return Renderer(FrameSize(32, 32), supersample=1)


@pytest.fixture(scope="module")
def tiny_renderer():
    return Renderer(FrameSize(16, 16), supersample=1)


def ignore_keys(actions, prompt):
    return (NEUTRAL,) * len(actions), prompt


def mirror_turns(actions, prompt):
    swap = {"j": "l", "l": "j"}
    return tuple(tuple(swap.get(key, key) for key in keys) for keys in actions), prompt


def walk_on(actions, prompt):
    return (("w",),) * len(actions), prompt


def ignore_prompt(actions, prompt):
    return actions, Prompt("", 0)


def test_the_truth_is_perfect(renderer):
    """The renderer itself gets the best value of every metric."""
    world = GroundTruthWorld(renderer)
    assert obedience(world, renderer, states=1, after=2).share >= 8 / 9  # a fitted pose is near, not exact
    assert prompt_switch(world, renderer, cases=2) == 1
    assert set(rollouts(world, renderer, 1, (0, 1), neutral=False).scores["generated"].values()) == {99.0}
    assert long_rollout(world, renderer, count=1, chunks=2, last=1) == {"mean": 1, "std": 1, "gradient": 1}


def test_a_world_that_ignores_keys(renderer):
    """Only the neutral action is obeyed, and pictures drift from the truth."""
    world = GroundTruthWorld(renderer, ignore_keys)
    found = obedience(world, renderer, states=1, after=1)
    assert found.by_key["none"] == 1
    assert found.share == pytest.approx(1 / 9)
    scores = rollouts(world, renderer, 1, (1,), neutral=True).scores
    assert scores["generated"] == scores["always neutral"]
    assert scores["generated"][1] < 25


def test_a_world_that_ignores_the_prompt(renderer):
    """It stays in one look, so prompt switches are missed."""
    assert prompt_switch(GroundTruthWorld(renderer, ignore_prompt), renderer, cases=2) <= 0.5


def test_a_full_turn(tiny_renderer):
    """The truth returns to its first view, after 360 degrees in the pictures of its contact sheet."""
    found = full_turn(GroundTruthWorld(tiny_renderer), tiny_renderer, count=1)
    assert found.turned == 1
    assert found.psnr > 40
    assert found.above == pytest.approx(found.psnr - found.random_view)
    assert found.above > 20
    assert len(found.sheet[0]) == 11
    assert all(np.abs(got.astype(int) - true).mean() < 1 for true, got in found.sheet[0])


@pytest.mark.parametrize("corrupt", [ignore_keys, mirror_turns])
def test_a_world_that_does_not_turn_right(tiny_renderer, corrupt):
    """A world that stays, or turns left, also ends at the first view. That counts for nothing."""
    found = full_turn(GroundTruthWorld(tiny_renderer, corrupt), tiny_renderer, count=1)
    assert (found.turned, found.above) == (0, 0)
    assert found.psnr > 40


def test_standing_still(renderer):
    """The truth keeps its first view exactly; a world that walks on loses it."""
    assert standing_still(GroundTruthWorld(renderer), renderer, 1, chunks=2) == {"no camera": 99, "no key": 99}
    drifted = standing_still(GroundTruthWorld(renderer, walk_on), renderer, 1, chunks=2)
    assert max(drifted.values()) < 25


def test_a_walk_is_recorded_beside_the_truth(renderer, tmp_path):
    """Truth left, generated right, at twice the size."""
    record_walk(GroundTruthWorld(renderer), renderer, tmp_path / "walk", chunks=2)
    shown = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "walk").iterdir())]
    assert len(shown) == 9 + 12
    assert shown[0].shape == (64, 128, 3)
    for frame in shown:
        np.testing.assert_array_equal(frame[:, :64], frame[:, 64:])
        np.testing.assert_array_equal(frame[::2, ::2], frame[1::2, 1::2])


def test_blur_shows_in_the_gradients(renderer):
    """A blurred picture keeps its mean and loses gradient energy."""
    start, _ = next(held_out_starts(1, purpose=9))
    sharp = picture(renderer, start.view, 0)[0].astype(np.float64)
    soft = (sharp + np.roll(sharp, 1, 0) + np.roll(sharp, 1, 1) + np.roll(sharp, (1, 1), (0, 1))) / 4
    mean, _, gradient = statistics(soft) / statistics(sharp)
    assert mean == pytest.approx(1, abs=1e-6)
    assert gradient < 0.7


def test_a_pose_is_found(renderer):
    """From a guess a step and a turn away, the fit gets within half of either."""
    true = View(*(np.array([value]) for value in (0.9, 0.7, 0.0, 4.0)))
    guess = View(true.x + 0.05, true.z - 0.05, true.yaw + 5, true.pitch)
    found = fit_view(renderer.coarse(), picture(renderer, true, 0)[0], guess, 0)
    assert np.hypot(found.x - true.x, found.z - true.z)[0] < 0.035
    assert abs(found.yaw - true.yaw)[0] < 2.5


def test_the_table_says_what_is_missed():
    """A bar is a lower limit, or for a ratio the largest distance from 1."""
    figures = {"rollout_psnr": {"generated": {1: 20.0}}, "obedience_1": {"w": 1.0}, "obedience_8": {"w": 0.5}}
    bars = [Bar("a", 30, 31, 34), Bar("b", 0.8, 0.25, 0.1, ratio=True), Bar("c", 35, 31, 34)]
    lines = as_markdown(bars, figures).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:5]] == ["missed", "bar", "aim"]
    assert [bar.reached for bar in bars] == [False, True, True]


def test_the_table_covers_what_was_measured():
    """Groups that were left out have no lines."""
    assert as_markdown([Bar("a", 3, 2, 4)], {"obedience_8": {"w": 0.5}}).splitlines()[2:] == [
        "| a | 3 | 2 | 4 | bar |",
        "",
        "| obedience | w |",
        "|---|---|",
        "| after 8 | 50% |",
    ]


def test_groups_are_named():
    """--only keeps the order of GROUPS and refuses unknown names."""
    assert _group_names("speed, vae") == ["vae", "speed"]
    assert set(_group_names(",".join(GROUPS))) == set(GROUPS)
    with pytest.raises(argparse.ArgumentTypeError, match="unknown: sped"):
        _group_names("sped")
