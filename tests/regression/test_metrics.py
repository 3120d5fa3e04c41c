"""PSNR, SSIM and mean difference against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lingbot_rt.regression.metrics import mean_abs_diff, psnr, ssim


@pytest.fixture
def picture():
    y, x = np.mgrid[:48, :64]
    waves = 127 + 60 * np.sin(x / 5) + 50 * np.cos(y / 7)
    return np.stack([waves, waves * 0.8, 255 - waves], axis=-1).clip(0, 255).astype(np.uint8)


def test_equal_pictures_are_perfect(picture):
    """A picture compared with itself: infinite PSNR, SSIM 1, no difference."""
    assert psnr(picture, picture) == math.inf
    assert ssim(picture, picture) == pytest.approx(1)
    assert mean_abs_diff(picture, picture) == 0


def test_a_constant_shift_is_counted_in_grey_levels(picture):
    """Two levels everywhere: difference 2, PSNR 20 log10(255 / 2), SSIM above 0.99."""
    shifted = np.clip(picture.astype(int) + 2, 0, 255).astype(np.uint8)
    assert mean_abs_diff(shifted, picture) == pytest.approx(2, abs=0.05)
    assert psnr(shifted, picture) == pytest.approx(20 * math.log10(255 / 2), abs=0.1)
    assert ssim(shifted, picture) > 0.99


def test_ssim_equals_a_plain_loop(picture):
    """Summed-area means give the same result as a loop over all windows."""
    noisy = np.clip(picture + np.random.default_rng(0).normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
    luma = [frame.astype(float) @ [0.299, 0.587, 0.114] for frame in (noisy, picture)]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for top in range(48 - 7):
        for left in range(64 - 7):
            x, y = (plane[top : top + 8, left : left + 8] for plane in luma)
            cov = ((x - x.mean()) * (y - y.mean())).mean()
            score = (2 * x.mean() * y.mean() + c1) * (2 * cov + c2)
            scores.append(score / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)))
    assert ssim(noisy, picture) == pytest.approx(np.mean(scores))


def test_pictures_smaller_than_a_window_have_a_score():
    """The window shrinks to the picture."""
    tiny = np.full((4, 6, 3), 9, np.uint8)
    assert ssim(tiny, tiny) == pytest.approx(1)
