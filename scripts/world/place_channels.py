"""Latent channels in which the model notes where it is, so that it still knows after its window has passed.

What comes into view is drawn from memory, by a network that knows its place in the world. The ray maps tell each
frame's motion only, and the window is four chunks long. Without a note the place must be read from generated pictures,
and once these blur it is lost. So the last channels of a chunk's latents hold the place of each latent frame, alike in
all cells. The network reads the chunks before, adds the motion and writes. The VAE writes zeros there and reads
nothing, and serving treats these channels like all others.

Only the mean over a token's cells counts, in training and for the reader: to clear the noise of every cell would take
four times as much of a token's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_rt.session.camera_path import PITCH_DEGREES, YAW_DEGREES
from lingbot_rt.shapes import PATCH_SIZE
from scripts.world.scene import PERIOD

_POSITION_WAVES: Sequence[int] = (1, 4)
"""Waves per period of the world: the first says roughly where, the last says it closely."""

_YAW_WAVES: Sequence[int] = (1, 4, 90 // YAW_DEGREES)
"""Waves per turn. The last has four values, because directions are whole steps of the keys: small errors round off."""

_PITCH_WAVE_DEGREES = 4 * PITCH_DEGREES  # four values too
_PITCH_SCALE = 30.0

PLACE_CHANNELS = 4 * len(_POSITION_WAVES) + 2 * len(_YAW_WAVES) + 3


def place_features(places: Tensor) -> Tensor:
    """x, z, yaw and pitch [..., 4] -> waves of position and direction, and the pitch, [..., PLACE_CHANNELS]."""
    x, z, yaw, pitch = places.unbind(-1)
    turn = 2 * math.pi
    angles = [turn / PERIOD * waves * value for waves in _POSITION_WAVES for value in (x, z)]
    angles += [turn / 360 * waves * yaw for waves in _YAW_WAVES] + [turn / _PITCH_WAVE_DEGREES * pitch]
    return torch.stack([f(angle) for angle in angles for f in (torch.sin, torch.cos)] + [pitch / _PITCH_SCALE], -1)


def write_places(latents_BzFhw: Tensor, places_BF4: Tensor) -> None:
    """Sets the place channels of true latents, in place."""
    features = place_features(places_BF4).movedim(-1, 1)
    latents_BzFhw[:, -PLACE_CHANNELS:] = features[..., None, None].to(latents_BzFhw)


def token_means(cells: Tensor) -> Tensor:
    """The mean over the cells of each token, [..., h, w] -> [..., h / 2, w / 2]."""
    return F.avg_pool2d(cells.flatten(0, -4), PATCH_SIZE).unflatten(0, cells.shape[:-3])


def disturb_cells(latents: Tensor, amount: float) -> Tensor:
    """Adds noise to the place channels [..., z, F, h, w] that leaves the mean of every token.

    Generated latents have such noise, which nothing in training removes.
    """
    pictures, places = latents.split([latents.shape[-4] - PLACE_CHANNELS, PLACE_CHANNELS], dim=-4)
    noise = torch.randn_like(places)
    means = token_means(noise).repeat_interleave(PATCH_SIZE, -1).repeat_interleave(PATCH_SIZE, -2)
    return torch.cat([pictures, places + amount * (noise - means)], dim=-4)


@torch.no_grad()
def leave_places_to_the_dit(vae: Any) -> None:
    """Zeroes what a new VAE would write to the place channels and read from them. Training keeps these zeros."""
    writes, reads = vae.quant_conv, vae.post_quant_conv
    for part in (writes.weight, writes.bias):
        part.unflatten(0, (2, -1))[:, -PLACE_CHANNELS:] = 0
    reads.weight[:, -PLACE_CHANNELS:] = 0
