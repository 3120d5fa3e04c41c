"""The renderer: both of its ways agree, the world has no edge, and its camera is that of the serving code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lingbot_rt.session.camera_path import CameraPath, invert
from lingbot_rt.session.controls import NEUTRAL
from lingbot_rt.shapes import FrameSize
from scripts.world.render import _MAX_INSTANCES, Renderer
from scripts.world.scene import LOOKS, PERIOD
from scripts.world.trajectories import (
    SINGLE_KEYS,
    View,
    branch,
    hiding_view,
    make_trajectory,
    random_actions,
    start_view,
    step_back_actions,
)

SIZE = FrameSize(48, 32)


@pytest.fixture(scope="module")
def renderer():
    return Renderer(SIZE, supersample=1)


def views(count: int) -> View:
    rng = np.random.default_rng(0)
    return View(*rng.uniform(0, PERIOD, (2, count)), rng.uniform(0, 360, count), rng.normal(0, 18, count))


def test_both_ways_to_render_agree(renderer):
    """Instance by instance in their rectangles, or all at once: the same picture."""
    poses, looks = torch.from_numpy(views(4).poses()).float(), torch.arange(4)[:, None]
    together = renderer._render_all(poses, looks)
    one_by_one = torch.cat([renderer._render_one(poses[i : i + 1], looks[i : i + 1]) for i in range(4)])
    assert (together.int() - one_by_one.int()).abs().max() <= 2


def test_two_looks_of_the_same_frames(renderer):
    """What is rendered in two looks at once is what is rendered in each of them."""
    poses, looks = views(3).poses(), torch.tensor([[0, 3], [1, 2], [2, 0]])
    both = renderer.render(poses, looks)
    assert both.shape == (3, 2, 32, 48, 3)
    for i in range(2):
        assert torch.equal(both[:, i], renderer.render(poses, looks[:, i]))


def test_the_accelerator_tests_all_instances_in_view():
    """Its kernels test a fixed number per kind of shape, which no view may exceed."""
    renderer, rng = Renderer(FrameSize(160, 96)), np.random.default_rng(2)
    view = View(
        *rng.uniform(0, PERIOD, (2, 2000)), rng.uniform(0, 360, 2000), np.clip(rng.normal(0, 20, 2000), -75, 75)
    )
    poses = torch.from_numpy(view.poses()).float()
    seen, _ = renderer._in_view(poses, renderer._positions(poses)[0])
    for kind, tested in _MAX_INSTANCES.items():
        of_kind = torch.tensor([each is kind for each in renderer._kinds]).repeat_interleave(9)
        most = seen[:, of_kind].sum(dim=1).max().item()
        assert tested / 2 < most <= tested


def test_a_torus(renderer):
    """Positions that differ by whole periods look the same."""
    here = views(3)
    there = View(here.x + PERIOD, here.z - 2 * PERIOD, here.yaw - 360, here.pitch)
    a, b = (renderer.render(view.poses(), [0] * 3).float() for view in (here, there))
    assert (a - b).abs().mean() < 0.5


def test_the_looks_differ(renderer):
    """At every position any two looks differ clearly; night is the darkest, snow the brightest."""
    pictures = torch.stack([renderer.render(views(4).poses(), [look] * 4).float() for look in range(len(LOOKS))])
    for a, b in itertools.combinations(range(len(LOOKS)), 2):
        assert (pictures[a] - pictures[b]).abs().mean(dim=(1, 2, 3)).min() > 20
    brightness = pictures.mean(dim=(1, 2, 3, 4)).tolist()
    names = [look.name for look in LOOKS]
    assert names[int(np.argmin(brightness))] == "night"
    assert names[int(np.argmax(brightness))] == "snow"


def test_no_place_is_blind(renderer):
    """Near landmarks sink, so that no view is a plain wall."""
    rng = np.random.default_rng(1)
    starts = [start_view(rng) for _ in range(20)]
    poses = np.concatenate([start.poses() for start in starts])
    spread = renderer.render(poses, [0] * 20).float().flatten(1, 2).std(dim=1).mean(-1)
    assert spread.min() > 25


def test_every_key_shows(renderer):
    """The nine actions give nine different pictures within a chunk."""
    start = View(*(np.array([value]) for value in (0.3, 0.7, 40.0, 0.0)))
    ends = np.concatenate([branch(start, keys, 3).at(-1).poses() for keys in SINGLE_KEYS])
    shown = renderer.render(ends, [0] * 9).float()
    for a, b in itertools.combinations(range(9), 2):
        assert (shown[a] - shown[b]).abs().mean() > 4


def test_a_hidden_landmark_rises_before_a_viewer_who_steps_back(renderer):
    """Training has walks that begin so: no landmark stands where the camera is, and a step back shows one."""
    rng = np.random.default_rng(4)
    actions = step_back_actions(rng, 12)
    assert actions[:6] == (NEUTRAL,) * 3 + (("s",),) * 3
    walks = [make_trajectory(hiding_view(rng), actions).view for _ in range(12)]
    before, after = (renderer.render(np.concatenate([walk.at(i).poses() for walk in walks]), [0] * 12) for i in (2, 5))
    random = [make_trajectory(start_view(rng), actions).view for _ in range(12)]
    usual, later = (renderer.render(np.concatenate([walk.at(i).poses() for walk in random]), [0] * 12) for i in (2, 5))

    def change(a, b):
        return (a.float() - b.float()).abs().mean()

    assert change(before, after) > 1.5 * change(usual, later)


def test_the_camera_is_the_serving_codes():
    """Relative poses are CameraPath's, chunk by chunk, and pictures are rendered from the same poses."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        actions = ((), *random_actions(rng, 14))
        trajectory = make_trajectory(start_view(rng), actions)
        path = CameraPath()
        expected = np.concatenate([path.extend(actions[i : i + 3]) for i in range(0, 15, 3)])
        assert np.array_equal(trajectory.relative, expected)
        poses = trajectory.view.poses()
        path, unscaled = CameraPath(), []
        for keys in actions:
            before = path.pose
            path.extend((keys,))
            unscaled.append(invert(before) @ path.pose)
        seen = [invert(poses[i - 1]) @ poses[i] for i in range(1, 15)]
        assert np.allclose(seen, unscaled[1:], atol=1e-9)


def test_pictures_between_latent_frames():
    """The fourth pixel frame of a latent frame has its pose; the three before are interpolated."""
    view = make_trajectory(start_view(np.random.default_rng(3)), (("w", "l"),) * 4).view
    pictures = view.pixel_frames()
    assert len(pictures.x) == 13
    assert np.allclose(pictures.poses()[::4], view.poses())
    assert np.allclose(np.diff(pictures.yaw), 6 / 4)
