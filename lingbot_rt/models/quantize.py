"""fp8 linears: float8_e4m3fn weights and activations, each with one scale per row.

The relative error is about 4 % per linear. Shapes: M rows of activations, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.errors import ConfigError

FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
LEAST_SCALE = 1e-12  # for a row of zeros
_MULTIPLE = 16
"""The fp8 kernels take features in multiples of this."""

FP8_CAPABILITY = (8, 9)
"""The first compute capability whose kernels can read and write fp8."""


class Rows(NamedTuple):
    """fp8 values [M, K] and float32 scales [M, 1]: x = value * scale."""

    values_MK: Tensor
    scale_M1: Tensor


def hadamard_block(head_dim: int) -> int:
    """Size of the blocks that ``hadamard`` mixes: the largest power of two in ``head_dim``, at most 32; 1 below 16."""
    block = min(head_dim & -head_dim, 32)
    return block if block >= 16 else 1


def hadamard(x: Tensor) -> Tensor:
    """Mixes each block of a head's dimensions by a Hadamard matrix: the last dimension of ``x``, an orthogonal map.

    Products of queries and keys stay the same when both are mixed. But no product hangs on a few large values any
    more, whose rounding errors do not average out: fp8 keys then cost half the error.
    """
    block = hadamard_block(x.shape[-1])
    if block == 1:
        return x
    mixed = x.float().unflatten(-1, (-1, block)) @ _hadamard_matrix(block, x.device)
    return mixed.flatten(-2).to(x.dtype)


@lru_cache(maxsize=4)
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """The symmetric orthogonal [size, size] matrix of signs / sqrt(size); ``size`` is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


class Float8Linear(nn.Module):
    """Replaces a Linear: y = x W^T + b with x and W rounded to fp8, sums in float32, y in the dtype of x."""

    weight: Tensor
    scale_1N: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Raises ConfigError when the features are not multiples of 16."""
        super().__init__()
        if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
            raise ConfigError(
                f"--quantization fp8 needs linears with multiples of {_MULTIPLE} features, this model has one of "
                f"{linear.in_features} x {linear.out_features}: use --quantization none",
                field="quantization",
            )
        weight_NK, scale_N1 = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight_NK)
        self.register_buffer("scale_1N", scale_N1.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = quantize_rows(x.flatten(0, -2))
        y_MN = product_on(x.device)(*rows, self.weight, self.scale_1N, x.dtype)
        # Not in the kernel: when compiled, the addition fuses with the operations after it.
        return (y_MN + self.bias).unflatten(0, x.shape[:-1])

    def product(self, rows: Rows) -> Tensor:
        """x W^T + b for rows that are fp8 already -> [M, N] in the dtype of the bias, which the kernel adds."""
        multiply = product_on(rows.values_MK.device)
        return multiply(*rows, self.weight, self.scale_1N, self.bias.dtype, self.bias)


def quantize_rows(x_MK: Tensor) -> Rows:
    """A row's largest magnitude becomes 448."""
    x = x_MK.float()
    scale_M1 = (x.abs().amax(dim=-1, keepdim=True) / MAX).clamp_min(LEAST_SCALE)
    return Rows(to_float8(x / scale_M1), scale_M1)


def to_float8(x: Tensor) -> Tensor:
    """Values beyond 448 become 448; torch alone would make them NaN."""
    return x.clamp(-MAX, MAX).to(FP8)


def scaled_mm(
    x_MK: Tensor, scale_M1: Tensor, w_NK: Tensor, scale_1N: Tensor, dtype: torch.dtype, bias_N: Tensor | None = None
) -> Tensor:
    """x w^T times the scales, plus the bias, by the device's fp8 kernel -> [M, N]."""
    return torch._scaled_mm(
        x_MK,
        w_NK.T,
        scale_a=scale_M1,
        scale_b=scale_1N,
        bias=bias_N,
        out_dtype=dtype,
        use_fast_accum=x_MK.is_cuda,
    )


def plain_scaled_mm(
    x_MK: Tensor, scale_M1: Tensor, w_NK: Tensor, scale_1N: Tensor, dtype: torch.dtype, bias_N: Tensor | None = None
) -> Tensor:
    """``scaled_mm`` in float32, for devices without an fp8 kernel and for tests."""
    y_MN = (F.linear(x_MK.float(), w_NK.float()) * scale_M1 * scale_1N).to(dtype)
    return y_MN if bias_N is None else y_MN + bias_N


def product_on(device: torch.device) -> Callable[..., Tensor]:
    return plain_scaled_mm if device.type == "cpu" else scaled_mm


def quantize_linears(module: nn.Module) -> None:
    """Replaces every Linear below ``module`` by a Float8Linear, one by one to bound the memory. Raises ConfigError."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Float8Linear(child))


def takes_fp8(device: torch.device) -> bool:
    """Whether kernels of this device read and write fp8. A CPU emulates it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError when fp8 linears cannot run. On a CPU they are emulated, and slower than plain ones."""
    if device.type != "cuda":
        return
    if not takes_fp8(device):
        capability = torch.cuda.get_device_capability(device)
        raise ConfigError(
            "--quantization fp8 needs a GPU of compute capability {}.{} or later, this one has {}.{}: use "
            "--quantization none".format(*FP8_CAPABILITY, *capability),
            field="quantization",
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"--quantization fp8 gives bfloat16 results, --dtype is {str(dtype).removeprefix('torch.')}: use "
            "--dtype bfloat16",
            field="quantization",
        )
