"""The Muon optimiser for many small matrices: those of equal shape are orthogonalised together.

torch.optim.Muon takes them one by one, which for this model is 2,400 kernels per step. The numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class BatchedMuon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and ``adjust_lr_fn="match_rms_adamw"``."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = orthogonalised(torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])))
                rate = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.float().unbind()), alpha=-rate)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> bfloat16 matrices of the same singular vectors and singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _by_shape(matrices: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    yield from shapes.values()
