"""The causal Wan VAE over diffusers' ``AutoencoderKLWan``, one latent frame at a time.

Shapes: z latent channels, h x w latent cells, H x W pixels, n pixel frames (1 for the first latent frame, then 4).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
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


# torch.compile cannot infer the operation's output shape, so it is registered here.
_compiled_onednn_conv = torch.library.custom_op("lingbot_rt::onednn_conv", _onednn_conv, mutates_args=())
_compiled_onednn_conv.register_fake(lambda x, weight, bias, padding, stride: F.conv3d(x, weight, bias, stride, padding))


# Compiled code leaves out the copy of a slice, and would keep every convolution's whole input until the decode ends.
_own_copy = torch.library.custom_op("lingbot_rt::own_copy", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor")
_own_copy.register_fake(torch.clone)


class CausalConv3d(WanCausalConv3d):
    """diffusers' causal convolution, which lets the kernel pad height and width, and uses oneDNN on a CPU.

    diffusers writes a padded copy of the input first, even when the cached frames already pad the time. On a CPU torch
    sends a float32 3-d convolution of batch 1 to its slow path. oneDNN is 3 to 15 times as fast at this project's
    shapes, with results equal up to rounding.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        width, height, self._past = (int(self._padding[i]) for i in (0, 2, 4))  # past: frames before the first one
        self.padding = (0, height, width)

    @classmethod
    def like(cls, conv: Any) -> CausalConv3d:
        """A new layer for the parameters of diffusers' ``conv``."""
        width, _, height, _, twice_time, _ = conv._padding
        padding = (twice_time // 2, height, width)
        return cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        missing = self._past
        if cache_x is not None and missing > 0:
            x, missing = torch.cat([cache_x, x], dim=2), missing - cache_x.shape[2]
        if missing > 0:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        conv: Callable[..., Tensor] = _compiled_onednn_conv if torch.compiler.is_compiling() else _onednn_conv
        return conv(input, weight, bias, self.padding, self.stride)


class ChannelNorm(WanRMS_norm):
    """diffusers' x / |x| sqrt(C) gamma over channels. On a CPU the norm is a plain sum of squares.

    On a CPU torch's vector norm over a strided dimension goes element by element, and took as long as the convolutions.
    """

    @classmethod
    def like(cls, norm: WanRMS_norm) -> ChannelNorm:
        """A new layer for the parameters of diffusers' ``norm``."""
        has_bias = isinstance(norm.bias, nn.Parameter)
        return cls(len(norm.gamma.flatten()), norm.channel_first, images=norm.gamma.dim() == 3, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or not self.channel_first:
            return super().forward(x)
        # 1e-24: the square of the floor that diffusers puts under the norm.
        inverse = x.square().sum(dim=1, keepdim=True).clamp_min_(1e-24).rsqrt_().mul_(self.scale)
        normed = (x * inverse).mul_(self.gamma)
        return normed.add_(self.bias) if isinstance(self.bias, Tensor) else normed


class Resample(WanResample):
    """diffusers' resampling. Uses isinstance, not ==, to detect the 'Rep' sentinel in the feature cache.

    torch 2.11 cannot trace diffusers' comparison of a tensor with a string: the compiled decode fell into 16 pieces.
    """

    @classmethod
    def like(cls, resample: Any) -> Resample:
        """A new layer for the parameters of diffusers' ``resample``."""
        out_dim: Any = resample.resample[1].out_channels if resample.mode.startswith("upsample") else None
        return cls(resample.dim, resample.mode, out_dim)

    def forward(self, x: Tensor, feat_cache: Slots | None = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006
        cached = None if feat_cache is None or self.mode != "upsample3d" else feat_cache[feat_idx[0]]
        if feat_cache is None or not isinstance(cached, Tensor):
            return super().forward(x, feat_cache, feat_idx)
        recent = x if x.shape[2] >= CACHE_T else torch.cat([cached, x], dim=2)
        feat_cache[feat_idx[0]] = recent[:, :, -CACHE_T:].clone()
        feat_idx[0] += 1
        # [B, 2 C, T, h, w] -> [B, C, 2 T, h, w]: the two frames made of each frame follow each other.
        doubled = self.time_conv(x, cached).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return super().forward(doubled)


_OWN_LAYERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    WanCausalConv3d: CausalConv3d.like,
    WanRMS_norm: ChannelNorm.like,
    WanResample: Resample.like,
}


def use_own_layers(module: nn.Module) -> None:
    """Replaces diffusers' layers below ``module`` by the ones above, which take over the parameters themselves."""
    for name, layer in list(module.named_children()):
        like = _OWN_LAYERS.get(type(layer))
        if like is not None:
            with torch.device("meta"):
                own = like(layer)
            own.load_state_dict(layer.state_dict(), assign=True)
            setattr(module, name, own)
            layer = own
        use_own_layers(layer)


STEADY_FROM = 2
"""Latent frames of a session after which every convolution caches its full two frames: shapes no longer change."""


def channels_last(module: nn.Module) -> None:
    """Moves the channels of 3-d convolution weights innermost, the layout that GPU kernels read."""
    for parameter in module.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def _compact(slot: Tensor) -> Tensor:
    """A cached tensor [1, C, 2, h, w] with storage of its own and one batch stride, from compiled code or not.

    Compiled code skips the copy of a slice, which would keep the whole sliced tensor alive. It also gives a batch of
    one another stride than plain code does, and torch.compile would recompile for it. The stride is set to a whole
    sample's: with a smaller one torch does not recognise channels-last memory, and would copy it into the other layout
    and back to join it to the next frames.
    """
    if slot.untyped_storage().nbytes() > slot.nbytes:
        slot = slot.clone()
    return slot.as_strided(slot.shape, (slot.numel(), *slot.stride()[1:]))


class StreamingVAE:
    """Encodes a session's first frame and decodes its latents. Latents outside of it are normalised.

    It keeps nothing of a session: the decoder's cached features are in the session's own FeatureCache.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        """Takes ``vae`` over: its layers are replaced in place by this module's own."""
        use_own_layers(vae)
        self._vae = vae.requires_grad_(False).eval()
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
        """diffusers' decoder, which ``parallel`` splits over ranks."""
        return self._vae.decoder

    def to(self, device: torch.device) -> StreamingVAE:
        nn.Module.to(self._vae, device)
        if device.type == "cuda":
            channels_last(self._vae)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._vae.parameters())

    @property
    def identifying_weights(self) -> tuple[Tensor, ...]:
        """Small ones that tell this network from others of its shape."""
        return self._vae.decoder.conv_in.weight, self._vae.encoder.conv_in.weight

    @property
    def on_meta(self) -> StreamingVAE:
        """The same network on the meta device: shapes only, no weights and no arithmetic.

        VAEs of the same configuration share it.
        """
        return self.on_meta_in(self.dtype)

    def on_meta_in(self, dtype: torch.dtype) -> StreamingVAE:
        """``on_meta`` in another number format."""
        return _on_meta(json.dumps(self._vae.config, sort_keys=True), dtype)

    def copy_in(self, dtype: torch.dtype) -> StreamingVAE:
        """A new network with these weights in another number format, neither compiled nor spread over ranks."""
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(dict(self._vae.config))
        copies = {name: weight.to(dtype, copy=True) for name, weight in self._vae.state_dict().items()}
        vae.load_state_dict(copies, assign=True)
        return StreamingVAE(vae)

    def new_features(self) -> FeatureCache:
        return FeatureCache(self._vae._cached_conv_counts["decoder"])

    def compile(self, backend: str = "inductor") -> None:
        """Runs the decode compiled from the third latent frame of a session on: only their shapes repeat.

        Compilation happens at the first use of each frame size.
        """
        self._steady_decode = torch.compile(self._decode, dynamic=False, backend=backend)

    def decode_latent_frame(self, latent: Tensor, features: FeatureCache) -> Tensor:
        """The next latent frame [1, z, 1, h, w] of a session -> pixels [1, 3, n, H, W] in [0, 1], float32."""
        decode = self._decode if features.frames < STEADY_FROM else self._steady_decode
        pixels, slots = decode(latent, features.slots, features.frames == 0)
        features.slots = [_compact(slot) if isinstance(slot, Tensor) else slot for slot in slots]
        features.frames += 1
        return pixels

    def _decode(self, latent: Tensor, slots: Slots, is_first: bool) -> tuple[Tensor, Slots]:
        """Pixels and the new slots; a pure function of its arguments."""
        slots = list(slots)  # diffusers writes into the list
        z = (latent.float() * self._std + self._mean).to(self.dtype)
        pixels = self._vae.decoder(self._vae.post_quant_conv(z), feat_cache=slots, feat_idx=[0], first_chunk=is_first)
        if self._patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self._patch_size)
        if torch.compiler.is_compiling():
            slots = [_own_copy(slot) if isinstance(slot, Tensor) else slot for slot in slots]
        return (pixels.float().clamp(-1, 1) / 2 + 0.5).clamp(0, 1), slots

    def encode_condition(self, image: Tensor, latent_frames: int) -> tuple[Tensor, Tensor]:
        """First frames [B, 3, H, W] in [-1, 1] -> float32 conditions [B, 4 + z, F, h, w] of chunk 0 and later."""
        return condition_chunks(self.encode(condition_video(image, latent_frames)))

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] -> float32 latents [B, z, F, h, w]: the distribution's mean, normalised."""
        mean = self._vae.encode(video.to(self.device, self.dtype)).latent_dist.mode().float()
        # diffusers keeps the encoder's features on the module. They must not outlive the session.
        self._vae.clear_cache()
        return (mean - self._mean) / self._std


@lru_cache(maxsize=4)
def _on_meta(config: str, dtype: torch.dtype) -> StreamingVAE:
    with torch.device("meta"):
        return StreamingVAE(nn.Module.to(AutoencoderKLWan.from_config(json.loads(config)), dtype))
