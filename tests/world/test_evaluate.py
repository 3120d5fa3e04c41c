"""The evaluation calls the truth perfect and says what is wrong with worlds that are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from lingbot_rt.session.controls import NEUTRAL
from lingbot_rt.shapes import FrameSize
from scripts.world.evaluate import Bar, as_markdown
from scripts.world.measures import fit, long_walk, obedience, picture, prompt_switch, rollouts, starts, statistics
from scripts.world.players import Prompt, TrueWorld
from scripts.world.render import Renderer
from scripts.world.walks import View


@pytest.fixture(scope="module")
def renderer():
    return Renderer(FrameSize(32, 32), supersample=1)


def deaf(actions, prompt):
    return (NEUTRAL,) * len(actions), prompt


def unread(actions, prompt):
    return actions, Prompt("", 0)


def test_the_truth_is_perfect(renderer):
    """Every measure of the true rendering itself is at its best."""
    world = TrueWorld(renderer)
    assert obedience(world, renderer, states=1, after=2).share >= 8 / 9  # a fit is near, not exact
    assert prompt_switch(world, renderer, cases=2) == 1
    assert set(rollouts(world, renderer, 1, (0, 1), neutral=False).scores["generated"].values()) == {99.0}
    assert long_walk(world, renderer, walks=1, chunks=2, last=1) == {"mean": 1, "std": 1, "gradient": 1}


def test_a_world_that_hears_no_key(renderer):
    """Only rest is obeyed, and walks drift from the truth."""
    world = TrueWorld(renderer, deaf)
    found = obedience(world, renderer, states=1, after=1)
    assert found.by_key["none"] == 1
    assert found.share == pytest.approx(1 / 9)
    scores = rollouts(world, renderer, 1, (1,), neutral=True).scores
    assert scores["generated"] == scores["always neutral"]
    assert scores["generated"][1] < 25


def test_a_world_that_reads_no_prompt(renderer):
    """It stays in one look: switches to others are missed."""
    assert prompt_switch(TrueWorld(renderer, unread), renderer, cases=2) <= 0.5


def test_blur_shows_in_the_gradients(renderer):
    """A softened picture keeps its mean and loses gradient energy."""
    start, _ = next(starts(1, purpose=9))
    sharp = picture(renderer, start.view, 0)[0].astype(np.float64)
    soft = (sharp + np.roll(sharp, 1, 0) + np.roll(sharp, 1, 1) + np.roll(sharp, (1, 1), (0, 1))) / 4
    mean, _, gradient = statistics(soft) / statistics(sharp)
    assert mean == pytest.approx(1, abs=1e-6)
    assert gradient < 0.7


def test_a_pose_is_found(renderer):
    """From a guess a step and a turn away, the fit comes nearer than half of either."""
    true = View(*(np.array([value]) for value in (0.4, 0.8, 30.0, 4.0)))
    guess = View(true.x + 0.05, true.z - 0.05, true.yaw + 5, true.pitch)
    found = fit(renderer.coarse(), picture(renderer, true, 0)[0], guess, 0)
    assert np.hypot(found.x - true.x, found.z - true.z)[0] < 0.035
    assert abs(found.yaw - true.yaw)[0] < 2.5


def test_the_table_says_what_is_missed():
    """Bars are at least, ratios are within."""
    figures = {"rollout_psnr": {"generated": {1: 20.0}}, "obedience_1": {"w": 1.0}, "obedience_8": {"w": 0.5}}
    bars = [Bar("a", 30, 31, 34), Bar("b", 0.8, 0.25, 0.1, ratio=True), Bar("c", 35, 31, 34)]
    lines = as_markdown(bars, figures).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:5]] == ["missed", "bar", "aim"]
    assert [bar.reached for bar in bars] == [False, True, True]
