"""The causal Wan VAE over diffusers' ``AutoencoderKLWan``, one latent frame at a time.

Shapes: z latent channels, h x w latent cells, H x W pixels, n pixel frames (1 for the first latent frame, then 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    CACHE_T,
    AutoencoderKLWan,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
    unpatchify,
)
from torch import Tensor, nn

from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.i2v_condition import condition_chunks, condition_video

Slots = list[Tensor | str | None]


def _onednn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)


# For torch.compile, to which the operation itself does not say what shape it gives.
_compiled_onednn_conv = torch.library.custom_op("lingbot_rt::onednn_conv", _onednn_conv, mutates_args=())
_compiled_onednn_conv.register_fake(lambda x, weight, bias, padding, stride: F.conv3d(x, weight, bias, stride, padding))


class CausalConv3d(WanCausalConv3d):
    """diffusers' causal convolution, through oneDNN on a CPU.

    torch sends a float32 3-d convolution of batch 1 to its slow path there; oneDNN is 3 to 15 times as fast at this
    project's shapes and agrees to rounding.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        conv: Callable[..., Tensor] = _compiled_onednn_conv if torch.compiler.is_compiling() else _onednn_conv
        return conv(input, weight, bias, self.padding, self.stride)


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


class Resample(WanResample):
    """diffusers' resampling, which tells by kind what is remembered from the word that stands for nothing yet.

    diffusers compares a tensor with a word, which torch 2.11 does not trace: the compiled decode fell into 16 pieces.
    """

    def forward(self, x: Tensor, feat_cache: Slots | None = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006
        remembered = None if feat_cache is None or self.mode != "upsample3d" else feat_cache[feat_idx[0]]
        if feat_cache is None or not isinstance(remembered, Tensor):
            return super().forward(x, feat_cache, feat_idx)
        known = x if x.shape[2] >= CACHE_T else torch.cat([remembered, x], dim=2)
        feat_cache[feat_idx[0]] = known[:, :, -CACHE_T:].clone()
        feat_idx[0] += 1
        # [B, 2 C, T, h, w]: a frame's two, one after the other.
        doubled = self.time_conv(x, remembered).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return super().forward(doubled)


STEADY_FROM = 2
"""Latent frames of a session after which every convolution remembers its full two frames: shapes no longer change."""

_OWN_LAYERS = {WanCausalConv3d: CausalConv3d, WanRMS_norm: ChannelNorm, WanResample: Resample}


def channels_last(module: nn.Module) -> None:
    """Weights of 3-d convolutions with their channels innermost, as an accelerator's kernels read them."""
    for parameter in module.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def _kept(slot: Tensor) -> Tensor:
    """A remembered tensor [1, C, 2, h, w] by itself and in one form, compiled code or not.

    Compiled code leaves out the copy of a slice, which would then keep all of what it is a slice of; and the stride of
    a batch of one, which says nothing, differs between the two, which would count as another shape. It is that of a
    whole sample: with a lesser one torch does not know channels-last memory for what it is, and joins it to the next
    frames by way of a copy into the other layout and back.
    """
    if slot.untyped_storage().nbytes() > slot.nbytes:
        slot = slot.clone()
    return slot.as_strided(slot.shape, (slot.numel(), *slot.stride()[1:]))


class StreamingVAE:
    """Encodes a session's first frame and decodes its latents; latents are normalised on this side of it.

    The module keeps nothing of a session: what the decoder remembers is in the session's own FeatureCache.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae.requires_grad_(False).eval()
        for module in vae.modules():
            # Same parameters, same arithmetic: the layers diffusers built only learn another way to compute it.
            module.__class__ = _OWN_LAYERS.get(type(module), type(module))
        if vae.device.type == "cuda":
            channels_last(vae)
        self._steady_decode = self._decode
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
        if device.type == "cuda":
            channels_last(self._vae)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @cached_property
    def on_meta(self) -> StreamingVAE:
        """The same network on the meta device: no weights, no arithmetic, every shape."""
        with torch.device("meta"):
            return StreamingVAE(nn.Module.to(AutoencoderKLWan.from_config(self._vae.config), self.dtype))

    def new_features(self) -> FeatureCache:
        return FeatureCache(self._vae._cached_conv_counts["decoder"])

    def compile(self, backend: str = "inductor") -> None:
        """From here on the steady decode runs compiled; a session's first two latent frames, whose shapes come once,
        do not. It is compiled at a frame size's first use."""
        self._steady_decode = torch.compile(self._decode, dynamic=False, backend=backend)

    def decode_latent_frame(self, latent: Tensor, features: FeatureCache) -> Tensor:
        """The next latent frame [1, z, 1, h, w] of a session -> pixels [1, 3, n, H, W] in [0, 1], float32."""
        decode = self._decode if features.frames < STEADY_FROM else self._steady_decode
        pixels, slots = decode(latent, features.slots, features.frames == 0)
        features.slots = [_kept(slot) if isinstance(slot, Tensor) else slot for slot in slots]
        features.frames += 1
        return pixels

    def _decode(self, latent: Tensor, slots: Slots, is_first: bool) -> tuple[Tensor, Slots]:
        """A function of what it is given: pixels, and what is remembered in place of ``slots``."""
        slots = list(slots)  # diffusers writes into it
        z = (latent.float() * self._std + self._mean).to(self.dtype)
        pixels = self._vae.decoder(self._vae.post_quant_conv(z), feat_cache=slots, feat_idx=[0], first_chunk=is_first)
        if self._patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self._patch_size)
        return (pixels.float().clamp(-1, 1) / 2 + 0.5).clamp(0, 1), slots

    def encode_condition(self, image: Tensor, latent_frames: int) -> tuple[Tensor, Tensor]:
        """First frames [B, 3, H, W] in [-1, 1] -> i2v conditions [B, 4 + z, F, h, w], float32: chunk 0's, every
        later's."""
        return condition_chunks(self.encode(condition_video(image, latent_frames)))

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] -> latents [B, z, F, h, w], float32: the distribution's mean, normalised,
        after diffusers' own causal encoding."""
        mean = self._vae.encode(video.to(self.device, self.dtype)).latent_dist.mode().float()
        # diffusers keeps the encoder's features on the module, and they would outlive the session.
        self._vae.clear_cache()
        return (mean - self._mean) / self._std
