"""IFNet against the original and against motion whose middle frames are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

SIZES = [(192, 320), (178, 306), (177, 305)]
"""Whole multiples of RIFE's 32 pixels, even sides that are none, and odd ones."""


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a.float() - b.float()) / 255).square().mean()))


def border(frame: torch.Tensor) -> torch.Tensor:
    """The bottom and right 16 pixels, where padding would show."""
    return torch.cat((frame[-16:].flatten(), frame[:, -16:].flatten()))


@pytest.mark.parametrize(("time", "scale"), [(0.5, 1.0), (0.25, 1.0), (0.5, 0.5)])
def test_the_network_is_the_original(interpolator, data, time, scale):
    """At its own sizes our IFNet gives what the original gives with the published file, at any time and scale."""
    golden = data("rife_v4")
    first, second = torch.from_numpy(golden["input"]).permute(0, 3, 1, 2).float().div(255).split(1)
    picture = interpolator.net(first, second, torch.tensor([time]), scale)[0] * 255
    np.testing.assert_allclose(picture.clamp(0, 255), golden[f"t{time}_scale{scale}"], atol=0.51)


@pytest.mark.parametrize("size", SIZES)
def test_the_middle_of_a_12_pixel_shift(interpolator, panning, size):
    """The frame between two 12 pixels apart is the true one at > 35 dB, at the borders too; a blend is far off."""
    first, truth, second = panning(3, *size, step=6)
    middle = interpolator(torch.stack((first, second)), 2, 1.0)[0, 0]
    blend = (first.float() + second.float()) / 2
    assert psnr(blend, truth) < 16
    assert psnr(middle, truth) > 35
    assert psnr(border(middle), border(truth)) > 35


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_motion_looked_for_at_another_resolution(interpolator, panning, scale):
    """At half and at twice the frames' resolution the motion is found as well, and the frames keep their size."""
    first, truth, second = panning(3, 178, 306, step=6)
    middle = interpolator(torch.stack((first, second)), 2, scale)[0, 0]
    assert middle.shape == first.shape
    assert psnr(middle, truth) > 30


def test_every_time_is_its_own_frame(interpolator, panning):
    """Three frames between two: each is the true one at its time, and they come in order."""
    frames = panning(5, 128, 192, step=3)
    between = interpolator(frames[[0, 4]], 4, 1.0)[0]
    for found, truth in zip(between, frames[1:4], strict=True):
        assert psnr(found, truth) > 33


def test_equal_frames_stay(interpolator, panning):
    """Between two equal frames is that frame, to one level in 256."""
    frame = panning(1, 96, 128, step=0)
    middle = interpolator(frame.repeat(2, 1, 1, 1), 2, 1.0)[0, 0]
    assert (middle.int() - frame[0].int()).abs().max() <= 1


def test_pairs_do_not_see_each_other(interpolator, panning):
    """Six pairs in one call, more than a forward takes, are what each pair gives alone."""
    frames = panning(7, 64, 96, step=4)
    together = interpolator(frames, 2, 1.0)
    assert together.shape == (6, 1, 64, 96, 3)
    for i in range(6):
        alone = interpolator(frames[i : i + 2], 2, 1.0)[0]
        assert (together[i].int() - alone.int()).abs().max() <= 1


def test_smallest_frames(interpolator):
    """A frame smaller than the coarsest grid goes through."""
    frames = torch.zeros(2, 5, 7, 3, dtype=torch.uint8)
    assert interpolator(frames, 2, 0.25).shape == (1, 1, 5, 7, 3)
