"""The causal Wan VAE over diffusers' ``AutoencoderKLWan``, one latent frame at a time.

Shapes: z latent channels, h x w latent cells, H x W pixels, n pixel frames (1 for the first latent frame, then 4).
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from torch import Tensor

from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.i2v_condition import condition_chunks, condition_video


class CausalConv3d(WanCausalConv3d):
    """diffusers' causal convolution, through oneDNN on a CPU.

    torch sends a float32 3-d convolution of batch 1 to its slow path there; oneDNN is 5 to 15 times as fast at this
    project's shapes.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        return torch.ops.aten.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


class StreamingVAE:
    """Encodes a session's first frame and decodes its latents; latents are normalised on this side of it."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae.requires_grad_(False).eval()
        for module in vae.modules():
            if type(module) is WanCausalConv3d:
                module.__class__ = CausalConv3d
        self.z_dim: int = vae.config.z_dim
        self._mean, self._std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    @property
    def device(self) -> torch.device:
        return self._vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self._vae.dtype

    def to(self, device: torch.device) -> StreamingVAE:
        self._vae.to(device)
        return self

    def new_features(self) -> FeatureCache:
        return FeatureCache(self._vae._cached_conv_counts["decoder"])

    def decode_latent_frame(self, latent: Tensor, features: FeatureCache) -> Tensor:
        """The next latent frame [1, z, 1, h, w] of a session -> pixels [1, 3, n, H, W] in [0, 1], float32."""
        x = self._vae.post_quant_conv(self._denormalise(latent))
        pixels = self._vae.decoder(x, feat_cache=features.slots, feat_idx=[0], first_chunk=features.frames == 0)
        features.frames += 1
        if self._vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self._vae.config.patch_size)
        return (pixels.float().clamp(-1, 1) / 2 + 0.5).clamp(0, 1)

    def encode_condition(self, image: Tensor, latent_frames: int) -> tuple[Tensor, Tensor]:
        """First frame [1, 3, H, W] in [-1, 1] -> i2v condition [1, 4 + z, F, h, w] of chunk 0 and of later ones."""
        video = condition_video(image.to(self.device, self.dtype), latent_frames)
        latents = self._vae.encode(video).latent_dist.mode()
        self._vae.clear_cache()
        return condition_chunks(self._normalise(latents.float()))

    def _normalise(self, latents: Tensor) -> Tensor:
        return (latents - self._mean.to(latents.device)) / self._std.to(latents.device)

    def _denormalise(self, latents: Tensor) -> Tensor:
        latents = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        return latents.to(self.dtype)
