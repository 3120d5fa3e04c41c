"""Image metrics of two frames uint8 [H, W, 3]."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]

_WINDOW = 8
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2


def psnr(got: Frame, expected: Frame) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal frames."""
    error = float(np.mean((got.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def mean_abs_diff(got: Frame, expected: Frame) -> float:
    """Mean absolute difference in grey levels, 0 to 255."""
    return float(np.mean(np.abs(got.astype(np.int16) - expected)))


def ssim(got: Frame, expected: Frame) -> float:
    """Structural similarity of the luma with uniform 8x8 windows (Wang et al. 2004, equation 13). 1 means equal."""
    x, y = _luma(got), _luma(expected)
    mean_x, mean_y = _box(x), _box(y)
    var_x, var_y = _box(x * x) - mean_x**2, _box(y * y) - mean_y**2
    cov = _box(x * y) - mean_x * mean_y
    score = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
    score /= (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return float(score.mean())


def _luma(frame: Frame) -> npt.NDArray[np.float64]:
    return frame.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def _box(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of every whole window, from a summed-area table."""
    window = min(_WINDOW, *values.shape)
    sums = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    total = sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    return total / window**2
