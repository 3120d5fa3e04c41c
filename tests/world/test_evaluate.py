"""The metrics are at their best for the renderer itself and worse for worlds that are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from lingbot_rt.session.controls import NEUTRAL
from lingbot_rt.shapes import FrameSize
from scripts.world.evaluate import Bar, as_markdown
from scripts.world.metrics import (
    fit_view,
    held_out_starts,
    long_rollout,
    obedience,
    picture,
    prompt_switch,
    rollouts,
    statistics,
)
from scripts.world.render import Renderer
from scripts.world.trajectories import View
from scripts.world.worlds import GroundTruthWorld, Prompt


@pytest.fixture(scope="module")
def renderer():
    return Renderer(FrameSize(32, 32), supersample=1)


def ignore_keys(actions, prompt):
    return (NEUTRAL,) * len(actions), prompt


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
    true = View(*(np.array([value]) for value in (0.4, 0.8, 30.0, 4.0)))
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
