"""What the 14B takes on one GPU by the estimate, beside what was measured. Operations has the table made of it."""

from __future__ import annotations

import pytest
import torch

from lingbot_rt.engine.capacity import PRECISIONS, SIZES, Estimate
from lingbot_rt.engine.memory import GB
from lingbot_rt.models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def folder():
    return open_checkpoint("lingbot-world-fast", load_format="dummy")


@pytest.mark.parametrize(
    ("precision", "vae_dtype", "measured"),
    [
        (PRECISIONS[0], torch.float32, 78.5),
        (PRECISIONS[0], torch.bfloat16, 71.5),
        (PRECISIONS[1], torch.float32, 60.2),
        (PRECISIONS[2], torch.bfloat16, 41.7),
    ],
    ids=["bfloat16, VAE float32", "bfloat16", "fp8 linears, VAE float32", "all fp8"],
)
def test_the_estimate_is_near_the_measured_peak(folder, precision, vae_dtype, measured):
    """Within 4 % of the peak of the tensors on an H100 at 832x480, window 18."""
    assert Estimate.of(folder, precision, vae_dtype).peak(SIZES[0], 18) / GB == pytest.approx(measured, rel=0.04)


def test_the_largest_window_fills_the_memory(folder):
    """It fits, one frame more does not, and a window of a byte per element is twice as long for the same memory."""
    wide, narrow = (Estimate.of(folder, precision) for precision in PRECISIONS[1:])
    free = int(60 * GB)
    window = wide.largest_window(SIZES[0], free)
    assert wide.peak(SIZES[0], window) <= free < wide.peak(SIZES[0], window + 1)
    assert narrow.largest_window(SIZES[0], free) in (2 * window, 2 * window + 1)
    assert wide.largest_window(SIZES[0], wide.peak(SIZES[0], 3)) == 3
    assert wide.largest_window(SIZES[0], wide.peak(SIZES[0], 3) - 1) == 0
