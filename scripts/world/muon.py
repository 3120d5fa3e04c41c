"""The Muon optimiser for many small matrices and kernels: those of equal shape are orthogonalised together.

torch.optim.Muon takes them one by one, which for the DiT is 2,400 GPU kernels per step. The numbers are the same. A
convolution's kernel counts as a matrix with one row per output channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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
                ahead = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                updates = orthogonalised(ahead.flatten(2))
                rate = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.float().view_as(ahead).unbind()), alpha=-rate)


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


def muon_and_adamw(
    module: nn.Module,
    for_muon: Callable[[str, nn.Parameter], bool],
    *,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    scale: float = 1.0,
) -> list[torch.optim.Optimizer]:
    """Muon for the trainable parameters that ``for_muon`` chooses by name and shape, AdamW for the others.

    Muon's learning rate is ``scale`` times AdamW's, for which ``betas`` and ``weight_decay`` are.
    """
    chosen, others = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        (chosen if for_muon(name, parameter) else others).append(parameter)
    muon = BatchedMuon(chosen)
    muon.param_groups[0]["scale"] = scale
    fused = others[0].is_cuda or None
    return [muon, torch.optim.AdamW(others, betas=betas, weight_decay=weight_decay, fused=fused)]
