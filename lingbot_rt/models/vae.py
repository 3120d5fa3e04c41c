"""The causal Wan VAE over diffusers' ``AutoencoderKLWan``, one latent frame at a time.

Shapes: z latent channels, h x w latent cells, H x W pixels, n pixel frames (1 for the first latent frame, then 4).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanRMS_norm,
    unpatchify,
)
from torch import Tensor, nn

from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.i2v_condition import condition_chunks, condition_video


class CausalConv3d(WanCausalConv3d):
    """diffusers' causal convolution, through oneDNN on a CPU.

    torch sends a float32 3-d convolution of batch 1 to its slow path there; oneDNN is 3 to 15 times as fast at this
    project's shapes and agrees to rounding.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        return torch.ops.aten.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


class ChannelNorm(WanRMS_norm):
    """diffusers' x / |x| sqrt(C) gamma over channels, with the norm as a plain sum of squares on a CPU.

    torch's vector norm walks a strided dimension one element at a time there: it took as long as the convolutions.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or not self.channel_first:
            return super().forward(x)
        # 1e-24: the square of the floor that diffusers puts under the norm.
        inverse = x.square().sum(dim=1, keepdim=True).clamp_min_(1e-24).rsqrt_().mul_(self.scale)
        return (x * inverse).mul_(self.gamma).add_(self.bias)


_FAST_ON_CPU = {WanCausalConv3d: CausalConv3d, WanRMS_norm: ChannelNorm}


class StreamingVAE:
    """Encodes a session's first frame and decodes its latents; latents are normalised on this side of it.

    The module keeps nothing of a session: what the decoder remembers is in the session's own FeatureCache.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae.requires_grad_(False).eval()
        for module in vae.modules():
            # Same parameters, same arithmetic: the layers diffusers built only learn another way to compute it.
            module.__class__ = _FAST_ON_CPU.get(type(module), type(module))
        config: dict[str, Any] = vae.config
        self.z_dim: int = config["z_dim"]
        self._patch_size: int | None = config["patch_size"]
        self._mean = torch.tensor(config["latents_mean"], device=self.device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config["latents_std"], device=self.device).view(1, -1, 1, 1, 1)

    @property
    def device(self) -> torch.device:
        return self._vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self._vae.dtype

    @property
    def decoder(self) -> nn.Module:
        """diffusers' own, for what shares it over ranks."""
        return self._vae.decoder

    def to(self, device: torch.device) -> StreamingVAE:
        nn.Module.to(self._vae, device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def new_features(self) -> FeatureCache:
        return FeatureCache(self._vae._cached_conv_counts["decoder"])

    def decode_latent_frame(self, latent: Tensor, features: FeatureCache) -> Tensor:
        """The next latent frame [1, z, 1, h, w] of a session -> pixels [1, 3, n, H, W] in [0, 1], float32."""
        z = (latent.float() * self._std + self._mean).to(self.dtype)
        pixels = self._vae.decoder(
            self._vae.post_quant_conv(z), feat_cache=features.slots, feat_idx=[0], first_chunk=features.frames == 0
        )
        features.frames += 1
        if self._patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self._patch_size)
        return (pixels.float().clamp(-1, 1) / 2 + 0.5).clamp(0, 1)

    def encode_condition(self, image: Tensor, latent_frames: int) -> tuple[Tensor, Tensor]:
        """First frame [1, 3, H, W] in [-1, 1] -> i2v conditions [1, 4 + z, F, h, w], float32: chunk 0's, every later's.

        The distribution's mean, normalised, after diffusers' own causal encoding of the two chunks' video.
        """
        video = condition_video(image.to(self.device, self.dtype), latent_frames)
        mean = self._vae.encode(video).latent_dist.mode().float()
        # diffusers keeps the encoder's features on the module, and they would outlive the session.
        self._vae.clear_cache()
        return condition_chunks((mean - self._mean) / self._std)
