"""What the causal VAE decoder remembers between latent frames: the last inputs of each causal convolution."""

from __future__ import annotations

from torch import Tensor


class FeatureCache:
    """A session's own list, never the module's: sessions may interleave. Entries are diffusers'."""

    def __init__(self, num_convolutions: int) -> None:
        self.slots: list[Tensor | str | None] = [None] * num_convolutions
        self.frames = 0

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots if isinstance(slot, Tensor))

    def release(self) -> None:
        """Frees the memory, whoever still holds this cache. Nothing else may be called afterwards."""
        self.slots.clear()
