"""A second task that teaches the DiT where it is: every token of some layers must tell its frame's pose.

What comes into view can only be drawn from memory, by a network that knows where in the world it stands. The ray maps
tell how the camera moved, never where it is. The error of pixels teaches this slowly; the error of the pose does it
directly, and the later layers and chunks read the result. Only training has this network.

The layers after the place is known are those that draw from memory. Asked at half of the depth only, a network of
twelve layers knew its place after the sixth: with true places in contexts that showed nothing else, a linear map read
them with an error of 0.06 after the fifth and 0.002 after the sixth. So it is also asked earlier.

B samples, S chunks, N tokens per chunk, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.world.config import CHUNK_FRAMES
from scripts.world.place_channels import PLACE_CHANNELS, place_features

DEPTHS = (0.25, 0.35, 0.5)
"""Shares of the layers after which the pose is asked for."""


class PoseReader(nn.Module):
    """A linear map for each of a few layers, from its tokens to the features of their frame's place."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = [max(int(depth * num_layers), 1) - 1 for depth in DEPTHS]
        self.out = nn.ModuleList(nn.Linear(dim, PLACE_CHANNELS) for _ in self.layers)
        for layer in self.out:
            nn.init.zeros_(layer.weight)

    def loss(self, hidden_2BSND: Sequence[Tensor], places_BS34: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the clean and of the noisy copies after each of the layers, [len(DEPTHS)] each.

        ``hidden_2BSND`` has the tokens after every layer. ``weight_BS`` is for the noisy copies: some lack the chunks
        before, from which alone a place can be told.
        """
        features = place_features(places_BS34)[None, :, :, :, None]
        errors = []
        for out, layer in zip(self.out, self.layers, strict=True):
            tokens = F.layer_norm(hidden_2BSND[layer].float(), hidden_2BSND[layer].shape[-1:])
            with torch.autocast(tokens.device.type, enabled=False):
                read = out(tokens.unflatten(3, (CHUNK_FRAMES, -1)))
            errors.append((read - features).square().mean(dim=(3, 4, 5)))
        clean, noisy = torch.stack(errors, dim=1).unbind(0)
        return clean.mean(dim=(1, 2)), (noisy * weight_BS).sum(dim=(1, 2)) / weight_BS.sum()
