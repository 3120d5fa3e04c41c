"""The VAE on whole clips, as training and data need it: all frames of a clip at once instead of one after another.

Serving encodes and decodes latent frame by latent frame, with the last frames of every convolution cached. Here the
convolutions see the whole clip, which gives the same numbers with a quarter of the kernels; a test holds this.

Shapes: B clips, z latent channels, F latent frames, T = 4 (F - 1) + 1 pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanResample,
    WanUpsample,
    patchify,
    unpatchify,
)
from torch import Tensor, nn


class WholeClipResample(WanResample):
    """diffusers' resampling of all frames of a clip. The first frame has no frames to join or to split into."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        first, rest = x[:, :, :1], x[:, :, 1:]
        if self.mode == "upsample3d" and rest.shape[2]:
            # [B, 2 C, T, h, w] -> [B, C, 2 T, h, w]: the two frames made of each frame follow each other.
            doubled = self.time_conv(rest).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([first, doubled], dim=2)
        x = super().forward(x)
        if self.mode == "downsample3d" and rest.shape[2]:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return x


class Upsample(WanUpsample):
    """diffusers' upsampling without its detour through float32: copies of pixels need no precision."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Upsample.forward(self, x)


def use_whole_clips(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lets ``vae.encoder`` and ``vae.decoder`` process whole clips, in place. Such a VAE does not stream."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.__class__ = WholeClipResample
        if isinstance(module, WanUpsample):
            module.__class__ = Upsample
    return vae


def encode(vae: Any, clips: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, T, H, W] in [-1, 1] -> means and log variances of the raw latents, [B, z, F, h, w] each."""
    moments = vae.quant_conv(vae.encoder(patchify(clips, patch_size=vae.config.patch_size)))
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents [B, z, F, h, w] -> pictures [B, 3, T, H, W] around [-1, 1], not clamped."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents)), patch_size=vae.config.patch_size)
