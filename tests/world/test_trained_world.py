"""The built-in model, run by the serving code, against the true world. A part that is disabled shows.

Limits are far below what is measured: docs/training.md has the figures, `scripts.world.evaluate` measures in full.
"""

from __future__ import annotations

import pytest

from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.models.model_path import BUILTIN_FOLDER
from scripts.world.metrics import full_turn, obedience, prompt_switch, rollouts
from scripts.world.render import Renderer
from scripts.world.worlds import ServedWorld


@pytest.fixture(scope="module")
def shipped():
    return ServedWorld(BUILTIN_FOLDER, "cpu", Renderer(open_checkpoint("builtin").default_size, "cpu"))


@pytest.fixture
def world(shipped, request, monkeypatch):
    """The model, without the part that a test names, one of ABLATIONS."""
    monkeypatch.setattr(shipped, "ablation", getattr(request, "param", None))
    return shipped


def walk(world) -> tuple[list[float], list[float]]:
    """Mean dB at chunks 1 and 3 of a walk: of the model's pictures, and of the first picture."""
    scores = rollouts(world, world.renderer, 1, (1, 3), neutral=False).scores
    return list(scores["generated"].values()), list(scores["first picture kept"].values())


def test_a_walk_shows_the_world(world):
    """The pictures of later chunks are those of the renderer, and far nearer to them than the first picture is."""
    got, kept = walk(world)
    assert got[0] > 22
    assert got[1] > 20
    assert got[1] > kept[1] + 6


@pytest.mark.parametrize("world", ["cache", "sink"], indirect=True)
def test_a_walk_without_its_window(world):
    """Without the keys and values of the past, or of the sink, the world is lost."""
    got, kept = walk(world)
    assert max(got) < 18
    assert got[1] < kept[1] + 3


def test_a_full_turn_comes_back(world):
    """After 360 degrees the picture is the first view again, drawn from memory and from the sink."""
    turn = full_turn(world, world.renderer, 1)
    assert turn.turned == 1
    assert turn.above > 3


def test_every_key_is_obeyed(world):
    """Of the nine keys' true pictures, the nearest is that of the held one."""
    assert obedience(world, world.renderer, states=1, after=1).share >= 8 / 9


@pytest.mark.parametrize("world", ["rays"], indirect=True)
def test_keys_without_ray_maps(world):
    """They do nothing."""
    found = obedience(world, world.renderer, states=1, after=1)
    assert found.share <= 2 / 9


def test_words_change_the_look(world):
    """Two chunks after new words the picture has the look that they ask for."""
    assert prompt_switch(world, world.renderer, cases=2) == 1


@pytest.mark.parametrize("world", ["text"], indirect=True)
def test_new_words_without_the_text(world):
    """They do nothing."""
    assert prompt_switch(world, world.renderer, cases=2) == 0
