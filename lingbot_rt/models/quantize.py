"""fp8 linears: float8_e4m3fn weights with a scale a row, activations scaled row by row as they come.

Not exact: about 4 % relative error a linear. Shapes: M rows of activations, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.errors import ConfigError

FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
_LEAST_SCALE = 1e-12  # of a row of zeros
_MULTIPLE = 16
"""Features in and out of what the device's fp8 kernels take."""

_CAPABILITY = (8, 9)


class Float8Linear(nn.Module):
    """In a Linear's place: y = x W^T + b with both factors rounded to fp8, sums in float32, y in the dtype of x."""

    weight: Tensor
    scale_1N: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Raises ConfigError when the features are not multiples of 16."""
        super().__init__()
        if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
            raise ConfigError(
                f"--quantization fp8: a linear of {linear.in_features} x {linear.out_features} features is not made of "
                f"multiples of {_MULTIPLE}: use --quantization none",
                field="quantization",
            )
        weight_NK, scale_N1 = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight_NK)
        self.register_buffer("scale_1N", scale_N1.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows_MK, scale_M1 = quantize_rows(x.flatten(0, -2))
        y_MN = product_on(x.device)(rows_MK, self.weight, scale_M1, self.scale_1N, x.dtype)
        # Apart from the kernel: compiled, the addition joins what follows.
        return (y_MN + self.bias).unflatten(0, x.shape[:-1])


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Values [M, K] in fp8, and float32 scales [M, 1] that give them back; a row's largest magnitude becomes 448."""
    x = x_MK.float()
    scale_M1 = (x.abs().amax(dim=-1, keepdim=True) / MAX).clamp_min(_LEAST_SCALE)
    return (x / scale_M1).clamp(-MAX, MAX).to(FP8), scale_M1


def scaled_mm(x_MK: Tensor, w_NK: Tensor, scale_M1: Tensor, scale_1N: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T with the scales undone, by the device's fp8 kernel -> [M, N]."""
    return torch._scaled_mm(
        x_MK, w_NK.T, scale_a=scale_M1, scale_b=scale_1N, out_dtype=dtype, use_fast_accum=x_MK.is_cuda
    )


def plain_scaled_mm(x_MK: Tensor, w_NK: Tensor, scale_M1: Tensor, scale_1N: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in float32: what runs where there is no such kernel, and what it is tested against."""
    return (F.linear(x_MK.float(), w_NK.float()) * scale_M1 * scale_1N).to(dtype)


def product_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]:
    return plain_scaled_mm if device.type == "cpu" else scaled_mm


def quantize_linears(module: nn.Module) -> None:
    """Every Linear below ``module`` becomes a Float8Linear, one after the other: at no time are there two copies of
    more than one weight. Raises ConfigError, see ``Float8Linear``."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Float8Linear(child))


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where fp8 linears cannot run. On a CPU they are emulated, and slower than plain ones."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise ConfigError(
            "--quantization fp8 needs a GPU of compute capability {}.{} or later, this one has {}.{}: use "
            "--quantization none".format(*_CAPABILITY, *capability),
            field="quantization",
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"--quantization fp8 gives bfloat16 results, --dtype is {str(dtype).removeprefix('torch.')}: use "
            "--dtype bfloat16",
            field="quantization",
        )
