"""Training on several GPUs of one machine: every process has its own data, and the gradients are averaged.

torchrun --nproc-per-node 2 -m scripts.world.train_dit teacher --minutes 9

One process writes the log, the saved state and the weights, and says when a stage's time is over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that ``torchrun`` started. Without torchrun it is the only one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Joins the processes that torchrun started, if it did. ``device``: "cuda" or "cpu"."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Values of the host cross by gloo: they never wait for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: float) -> float:
        """The first process's ``value``, in all."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    @torch.no_grad()
    def share_weights(self, *modules: nn.Module) -> None:
        """Gives all processes the first one's parameters."""
        if self.count > 1:
            for module in modules:
                for parameter in module.parameters():
                    dist.broadcast(parameter, 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over all processes, in one transfer."""
        if self.count == 1:
            return
        grads: list[Tensor] = [one.grad for one in parameters if one.grad is not None]
        together = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(together)
        together /= self.count
        parts = together.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
