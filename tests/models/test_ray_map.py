"""Ray maps against the reference's float32 tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.shapes import FrameSize, intrinsics

from .conftest import CPU

SCRIPTS = ["forward_walk", "strafe", "look_left_right", "combined", "long_history_120", "walk_with_pitch", "empty"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("size", "rows", "columns"), [("256x160", 9, 15), ("832x480", 29, 51)])
def test_rays_equal_the_reference(golden, script, size, rows, columns):
    """Relative poses give the reference's ray origins and directions, and its statistics over the whole tensor."""
    with np.load(golden("camera/camera_scripts.npz")) as data:
        poses = data[f"{script}.rel_f32"][-3:].astype(np.float64)
        expected = data[f"{script}.plucker_{size}_f32_sub"]
    got = ray_map(poses, FrameSize.parse(size), CPU)
    assert got.dtype == torch.float32
    assert np.abs(got[..., ::rows, ::columns].numpy() - expected).max() <= 1e-5
    statistics = json.loads(golden("camera/camera.json").read_text())["scripts"][script][f"plucker_{size}_f32"]
    assert list(got.shape) == statistics["shape"]
    assert got.double().mean().item() == pytest.approx(statistics["mean"], abs=1e-6)


def test_whole_tensor(golden):
    """Every element at 96x64: origin and direction of all 8x8 pixels of a latent cell, folded in the right order."""
    with np.load(golden("camera/camera_scripts.npz")) as data:
        poses = data["combined.rel_f32"][-3:].astype(np.float64)
    with np.load(golden("camera/camera_plucker_full.npz")) as data:
        expected = data["combined.plucker_96x64_f32"]
    assert np.abs(ray_map(poses, FrameSize(96, 64), CPU).numpy() - expected).max() <= 1e-5


def test_directions_are_unit_vectors_and_origins_the_pose():
    """Any pose: the first three channels groups repeat its translation, the last three are unit rays."""
    pose = np.eye(4)
    pose[:3, 3] = (0.25, -0.5, 1)
    got = ray_map(pose[None], FrameSize(64, 32), CPU)[0].unflatten(0, (6, 64))
    assert got[:3].flatten(1).std(dim=1).max() == 0
    assert got[:3, 0, 0, 0, 0].tolist() == [0.25, -0.5, 1]
    assert (got[3:].norm(dim=0) - 1).abs().max() <= 1e-6


def test_a_stated_lens_that_is_the_models_own_changes_no_bit(golden):
    """Stated or not, (500, 500, centre) gives the same rays; another lens gives other ones."""
    size = FrameSize(96, 64)
    with np.load(golden("camera/camera_scripts.npz")) as data:
        poses = data["combined.rel_f32"][-3:].astype(np.float64)
    own = np.array([intrinsics(size)] * 3)
    assert torch.equal(ray_map(poses, size, CPU, own), ray_map(poses, size, CPU))
    assert not torch.equal(ray_map(poses, size, CPU, own * 1.1), ray_map(poses, size, CPU))


def test_rays_of_a_lens_that_zooms():
    """Each latent frame's directions are those of its own intrinsics: K^-1 of the pixel's centre, turned and unit."""
    size = FrameSize(48, 32)
    turn = np.eye(4)
    turn[:3, :3] = [[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]]
    poses = np.stack([np.eye(4), turn, turn])
    lenses = np.array([[40.0, 50, 24, 16], [20, 25, 20, 10], [40, 50, 24, 16]])
    got = ray_map(poses, size, CPU, lenses)[0, 192:].unflatten(0, (3, 8, 8)).double().numpy()
    for f, (fx, fy, cx, cy) in enumerate(lenses):
        for x, y in ((0, 0), (47, 31), (13, 22)):
            ray = np.linalg.inv([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]) @ [x + 0.5, y + 0.5, 1]
            expected = poses[f, :3, :3] @ ray / np.linalg.norm(ray)
            assert np.abs(got[:, y % 8, x % 8, f, y // 8, x // 8] - expected).max() <= 1e-6
