"""fp8 linears: the arithmetic on a CPU, where it is emulated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import load_dit
from lingbot_rt.models.quantize import (
    FP8,
    Float8Linear,
    plain_scaled_mm,
    quantize_linears,
    quantize_rows,
    require_fp8,
    scaled_mm,
)

from .conftest import CPU, Rollout, new_cache


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def test_rows_come_back_within_half_a_step():
    """Every value is within 1/16 of itself or half of fp8's smallest step; a row of zeros stays zeros."""
    x = torch.randn(32, 64) * torch.logspace(-4, 4, 32)[:, None]
    x[7] = 0
    values, scale = quantize_rows(x)
    assert values.dtype == FP8
    assert ((values.float() * scale - x).abs() <= (x.abs() / 16).maximum(scale * 2**-10)).all()
    assert values.float().abs().amax(1)[torch.arange(32) != 7].eq(448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_product_is_the_kernels(dtype):
    """The emulation equals torch's own fp8 product, which CPUs have too, to the rounding of its result."""
    x, x_scale = quantize_rows(torch.randn(40, 96))
    w, w_scale = quantize_rows(torch.randn(48, 96))
    try:
        expected = scaled_mm(x, x_scale, w, w_scale.T.contiguous(), dtype)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no fp8 product with row scales on a CPU: {error}")
    got = plain_scaled_mm(x, x_scale, w, w_scale.T.contiguous(), dtype)
    assert relative_rms(got, expected) <= (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_stays_close(dtype):
    """A linear of random rows, some of them a thousand times larger, is within 5 % relative RMS of the plain one."""
    linear = nn.Linear(256, 128).to(dtype)
    x = (torch.randn(2, 24, 256) * torch.logspace(-1, 2, 24)[:, None]).to(dtype)
    got, expected = Float8Linear(linear)(x), linear(x)
    assert (got.dtype, got.shape) == (dtype, expected.shape)
    for row in range(24):
        assert 1e-3 < relative_rms(got[:, row], expected[:, row]) <= 5e-2


def test_only_the_blocks_linears(dit):
    """Of a block every linear is quantized, its bias shared; norms stay, and what is outside is not touched."""
    quantized = copy.deepcopy(dit)
    for block in quantized.blocks:
        quantize_linears(block)
    kinds = {name: type(module) for name, module in quantized.named_modules()}
    linears = [name for name, module in dit.named_modules() if type(module) is nn.Linear]
    for name in linears:
        assert kinds[name] is (Float8Linear if name.startswith("blocks.") else nn.Linear)
    assert sum(name.startswith("blocks.0.") for name in linears) == 2 + 4 + 4 + 2  # self, cross, camera, ffn
    weight = quantized.get_submodule("blocks.0.ffn.0").weight
    assert weight.element_size() == 1
    assert weight.shape == dit.get_submodule("blocks.0.ffn.0").weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twelve_chunks(dit_folder, arrays, dtype):
    """Over twelve chunks, the window sliding, fp8 latents stay within 3 % relative RMS of the unquantized model's."""
    plain = load_dit(dit_folder, dtype, CPU)
    quantized = copy.deepcopy(plain)
    for block in quantized.blocks:
        quantize_linears(block)
    golden = arrays("dit/rollout_main_inputs")
    twelve = torch.arange(12) % 7
    inputs = golden | {name: golden[name][twelve] for name in ("init_noise", "renoise", "plucker")}
    rollouts = [Rollout(dit, inputs, new_cache(dit)) for dit in (plain, quantized)]
    errors = []
    for _ in range(12):
        expected, got = (rollout.step() for rollout in rollouts)
        errors.append(relative_rms(got, expected))
    assert min(errors) > 1e-3
    assert max(errors) <= 3e-2


def test_features_must_be_multiples_of_16():
    """A linear that no fp8 kernel takes is named with its size."""
    with pytest.raises(ConfigError, match=r"24 x 32.*--quantization none"):
        Float8Linear(nn.Linear(24, 32))


def test_where_it_cannot_run(monkeypatch):
    """A GPU before Ada, and float32 on any, are refused with what to do; a CPU emulates."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9 or later, this one has 8\.0: use --quantization none"):
        require_fp8(device, torch.bfloat16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    require_fp8(device, torch.bfloat16)
    with pytest.raises(ConfigError, match="use --dtype bfloat16"):
        require_fp8(device, torch.float32)
    require_fp8(CPU, torch.float32)
