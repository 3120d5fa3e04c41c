"""The last inputs of each causal convolution of the VAE decoder, kept between latent frames."""

from __future__ import annotations

from torch import Tensor


class FeatureCache:
    """Belongs to a session, not to the module, so that sessions can interleave. Entries have diffusers' format."""

    def __init__(self, num_convolutions: int) -> None:
        self.slots: list[Tensor | str | None] = [None] * num_convolutions
        self.frames = 0  # latent frames decoded

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots if isinstance(slot, Tensor))

    def release(self) -> None:
        """Frees the memory, whoever still holds this cache. Nothing else may be called afterwards."""
        self.slots = [None] * len(self.slots)
