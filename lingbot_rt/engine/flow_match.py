"""Flow matching as pure functions: sigmas, shift, x0 from the velocity, re-noising.

x_t = (1 - sigma) x0 + sigma noise, velocity v = noise - x0, so x0 = x_t - sigma v. timestep = 1000 sigma.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000

CLEAN = 0.0
"""The timestep of clean latents."""


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising forward."""

    timestep: float  # the network's input: 1000 sigma, rounded to float32
    sigma: float  # the share of noise in the latents, in [0, 1]


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma): moves steps towards the noisy end for s > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """The distilled timesteps of a checkpoint before the shift, and the shift."""

    shift: float
    steps: tuple[int, ...]

    def steps_for(self, num_steps: int) -> tuple[Step, ...]:
        """The steps for a request's ``num_inference_steps``, 1 <= n <= 50, before the shift as follows.

        n <= N, the number of distilled steps: the distilled steps at round(linspace(0, N, n + 1))[:-1], which are all
        of them for n = N. n > N: linspace(1000, 0, n + 1)[:-1].
        """
        if num_steps <= len(self.steps):
            picks = np.round(np.linspace(0, len(self.steps), num_steps + 1))[:-1].astype(int)
            unwarped = [float(self.steps[i]) for i in picks]
        else:
            unwarped = np.linspace(TRAIN_TIMESTEPS, 0, num_steps + 1)[:-1].tolist()
        return tuple(self._step(timestep) for timestep in unwarped)

    def _step(self, unwarped: float) -> Step:
        # All in float32, as in the reference's table: the timestep must be equal to the last bit.
        sigma = shift_sigma(torch.tensor(unwarped / TRAIN_TIMESTEPS, dtype=torch.float32), self.shift)
        return Step(timestep=(sigma * TRAIN_TIMESTEPS).item(), sigma=sigma.item())


def predict_x0(x_t: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """x0 = x_t - sigma v, computed in float64, returned in the dtype of ``flow``."""
    return (x_t.double() - sigma * flow.double()).to(flow.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) x0 + sigma noise, computed in float32, returned in the dtype of ``x0``."""
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)
