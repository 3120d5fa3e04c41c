"""A second task that teaches the DiT where it is: every token of the middle layer must tell its frame's pose.

What comes into view can only be drawn from memory, by a network that knows where in the world it stands. The ray maps
tell how the camera moved, never where it is. The error of pixels teaches this slowly; the error of the pose does it
directly, and the later layers and chunks read the result. Only training has this network.

B samples, S chunks, N tokens per chunk, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.world.config import CHUNK_FRAMES
from scripts.world.scene import PERIOD

_WAVES = (1, 2, 4)
"""Waves per period of the world: the first says roughly where, the last to a few hundredths of a unit."""

_PITCH_SCALE = 30.0
FEATURES = 4 * len(_WAVES) + 4 + 1


class PoseReader(nn.Module):
    """A linear map from tokens to the features of their frame's place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, FEATURES)
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


def place_features(places: Tensor) -> Tensor:
    """x, z, yaw and pitch [..., 4] -> waves of position and direction, and the pitch, [..., FEATURES]."""
    x, z, yaw, pitch = places.unbind(-1)
    turn, heading = 2 * math.pi / PERIOD, torch.deg2rad(yaw)
    angles = [turn * waves * value for waves in _WAVES for value in (x, z)] + [heading, 2 * heading]
    return torch.stack([f(angle) for angle in angles for f in (torch.sin, torch.cos)] + [pitch / _PITCH_SCALE], -1)
