"""The true world: the same whichever way it is drawn, without an edge, and seen by the serving code's camera."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lingbot_rt.session.camera_path import CameraPath, invert
from lingbot_rt.shapes import FrameSize
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS, PERIOD
from scripts.world.walks import SINGLE, View, branch, random_actions, start_view, walk

SIZE = FrameSize(48, 32)


@pytest.fixture(scope="module")
def renderer():
    return Renderer(SIZE, supersample=1)


def views(count: int) -> View:
    rng = np.random.default_rng(0)
    return View(*rng.uniform(0, PERIOD, (2, count)), rng.uniform(0, 360, count), rng.normal(0, 18, count))


def test_both_ways_to_draw_agree(renderer):
    """Instance by instance inside their rectangles, or all at once: the same picture."""
    poses, looks = torch.from_numpy(views(4).poses()).float(), torch.arange(4)
    together = renderer._draw_all(poses, looks)
    one_by_one = torch.cat([renderer._draw_one(poses[i : i + 1], looks[i : i + 1]) for i in range(4)])
    assert (together.int() - one_by_one.int()).abs().max() <= 2


def test_a_torus(renderer):
    """One period further in any direction is the same place."""
    here = views(3)
    there = View(here.x + PERIOD, here.z - 2 * PERIOD, here.yaw - 360, here.pitch)
    a, b = (renderer.render(view.poses(), [0] * 3).float() for view in (here, there))
    assert (a - b).abs().mean() < 0.5


def test_the_looks_differ(renderer):
    """From any place no two looks can be confused; night is the darkest, snow the brightest."""
    pictures = torch.stack([renderer.render(views(4).poses(), [look] * 4).float() for look in range(len(LOOKS))])
    for a, b in itertools.combinations(range(len(LOOKS)), 2):
        assert (pictures[a] - pictures[b]).abs().mean(dim=(1, 2, 3)).min() > 20
    brightness = pictures.mean(dim=(1, 2, 3, 4)).tolist()
    names = [look.name for look in LOOKS]
    assert names[int(np.argmin(brightness))] == "night"
    assert names[int(np.argmax(brightness))] == "snow"


def test_no_place_is_blind(renderer):
    """Landmarks bow to whoever comes near: from nowhere is the picture one plain wall."""
    rng = np.random.default_rng(1)
    starts = [start_view(rng) for _ in range(20)]
    poses = np.concatenate([start.poses() for start in starts])
    spread = renderer.render(poses, [0] * 20).float().flatten(1, 2).std(dim=1).mean(-1)
    assert spread.min() > 25


def test_every_key_shows(renderer):
    """The nine actions lead to nine different pictures within a chunk."""
    start = View(*(np.array([value]) for value in (0.3, 0.7, 40.0, 0.0)))
    ends = np.concatenate([branch(start, keys, 3).at(-1).poses() for keys in SINGLE])
    shown = renderer.render(ends, [0] * 9).float()
    for a, b in itertools.combinations(range(9), 2):
        assert (shown[a] - shown[b]).abs().mean() > 4


def test_the_camera_is_the_serving_codes():
    """Ray maps are made of what CameraPath gives chunk by chunk, and the world is seen from just those poses."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        actions = ((), *random_actions(rng, 14))
        made = walk(start_view(rng), actions)
        path = CameraPath()
        expected = np.concatenate([path.extend(actions[i : i + 3]) for i in range(0, 15, 3)])
        assert np.array_equal(made.relative, expected)
        poses = made.view.poses()
        path, unscaled = CameraPath(), []
        for keys in actions:
            before = path.pose
            path.extend((keys,))
            unscaled.append(invert(before) @ path.pose)
        seen = [invert(poses[i - 1]) @ poses[i] for i in range(1, 15)]
        assert np.allclose(seen, unscaled[1:], atol=1e-9)


def test_pictures_between_latent_frames():
    """The fourth picture of a latent frame is its pose; those before share the way."""
    made = walk(start_view(np.random.default_rng(3)), (("w", "l"),) * 4).view
    pictures = made.between()
    assert len(pictures.x) == 13
    assert np.allclose(pictures.poses()[::4], made.poses())
    assert np.allclose(np.diff(pictures.yaw), 6 / 4)
