"""The last inputs of each causal convolution of the VAE decoder, kept between latent frames."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_rt.models.transfer import HostPlace


class FeatureCache:
    """Belongs to a session, not to the module, so that sessions can interleave. Entries have diffusers' format."""

    def __init__(self, num_convolutions: int) -> None:
        self.slots: list[Tensor | str | None] = [None] * num_convolutions
        self.frames = 0  # latent frames decoded
        self._hosts = [HostPlace() for _ in range(num_convolutions)]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots if isinstance(slot, Tensor))

    @property
    def missing_host_bytes(self) -> int:
        """Host memory that is still to be taken before the features can leave their GPU."""
        places = zip(self._hosts, self.slots, strict=True)
        return sum(host.missing_bytes(slot) for host, slot in places if isinstance(slot, Tensor))

    def release(self) -> None:
        """Frees the memory, whoever still holds this cache. Nothing else may be called afterwards."""
        self.slots = [None] * len(self.slots)
        self._hosts = []

    def move(self, device: torch.device) -> None:
        """Moves the features to ``device``; they are there once the stream has come so far."""
        self.slots = [
            host.move(slot, device) if isinstance(slot, Tensor) else slot
            for host, slot in zip(self._hosts, self.slots, strict=True)
        ]
