"""A second task that teaches the DiT where it is: every token of the middle layer must tell its frame's pose.

What comes into view can only be drawn from memory, by a network that knows where in the world it stands. The ray maps
tell how the camera moved, never where it is. The error of pixels teaches this slowly; the error of the pose does it
directly, and the later layers and chunks read the result. Only training has this network.

B samples, S chunks, N tokens per chunk, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.world.config import CHUNK_FRAMES
from scripts.world.place_channels import PLACE_CHANNELS, place_features


class PoseReader(nn.Module):
    """A linear map from tokens to the features of their frame's place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, PLACE_CHANNELS)
        nn.init.zeros_(self.out.weight)

    def loss(self, hidden_2BSND: Tensor, places_BS34: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the clean and of the noisy copies, averaged.

        ``weight_BS`` is for the noisy copies: some lack the chunks before, from which alone a place can be told.
        """
        tokens = F.layer_norm(hidden_2BSND.float(), hidden_2BSND.shape[-1:]).unflatten(3, (CHUNK_FRAMES, -1))
        with torch.autocast(tokens.device.type, enabled=False):
            read = self.out(tokens)
        error = (read - place_features(places_BS34)[None, :, :, :, None]).square().mean(dim=(3, 4, 5))
        clean, noisy = error.unbind(0)
        return clean.mean(), (noisy * weight_BS).sum() / weight_BS.sum()
