"""fp8 linears on the accelerator's own kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import load_dit
from lingbot_rt.models.quantize import (
    Float8Linear,
    plain_scaled_mm,
    quantize_linears,
    quantize_rows,
    require_fp8,
    scaled_mm,
)
from tests.models.conftest import Rollout, arrays, dit_folder, new_cache  # noqa: F401
from tests.models.test_quantize import relative_rms

from .conftest import DEVICE

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _inference():
    try:
        require_fp8(DEVICE, BF16)
    except ConfigError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("rows", [1, 24, 4680])
def test_the_kernel_is_the_plain_product(rows):
    """Rows and columns with scales of their own; sums may be less exact than float32's by 2^-7."""
    torch.manual_seed(rows)
    x, x_scale = quantize_rows(torch.randn(rows, 1024, device=DEVICE))
    w, w_scale = quantize_rows(torch.randn(512, 1024, device=DEVICE))
    scale_1N = w_scale.T.contiguous()
    got, expected = scaled_mm(x, x_scale, w, scale_1N, BF16), plain_scaled_mm(x, x_scale, w, scale_1N, BF16)
    assert relative_rms(got, expected) <= 2**-7


def test_a_linear_stays_close_to_bfloat16():
    """Every row, some of them a thousand times larger, is within 4.5 % relative RMS of the plain linear's."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 512).to(DEVICE, BF16)
    x = (torch.randn(2, 24, 1024, device=DEVICE) * torch.logspace(-1, 2, 24, device=DEVICE)[:, None]).to(BF16)
    got, expected = Float8Linear(linear)(x), linear(x)
    assert (got.dtype, got.shape) == (BF16, expected.shape)
    for row in range(24):
        assert 1e-3 < relative_rms(got[:, row], expected[:, row]) <= 4.5e-2


def test_twelve_chunks_stay_close_to_bfloat16(dit_folder, arrays):  # noqa: F811
    """Each model runs on its own latents, the window sliding: they stay within 3 % relative RMS."""
    plain = load_dit(dit_folder, BF16, DEVICE)
    quantized = copy.deepcopy(plain)
    for block in quantized.blocks:
        quantize_linears(block)
    golden = {name: array.to(DEVICE) for name, array in arrays("dit/rollout_main_inputs").items()}
    twelve = torch.arange(12) % 7
    inputs = golden | {name: golden[name][twelve] for name in ("init_noise", "renoise", "plucker")}
    rollouts = [Rollout(dit, inputs, new_cache(dit)) for dit in (plain, quantized)]
    errors = []
    for _ in range(12):
        expected, got = (rollout.step() for rollout in rollouts)
        errors.append(relative_rms(got, expected))
    assert min(errors) > 1e-3
    assert max(errors) <= 3e-2
