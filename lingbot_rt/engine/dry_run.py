"""Peak memory of a chunk beside weights and window, found by running it on the meta device.

The meta device computes and allocates nothing, but tensors have their sizes and lifetimes there. So the count is exact
for uncompiled code, at any size and for any model. Compiled code takes less. Memory that kernels use inside is not
counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import quantize_linears
from lingbot_rt.models.vae import STEADY_FROM, StreamingVAE
from lingbot_rt.shapes import FrameSize

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class PeakActivations:
    """The most bytes at once in each part of a session."""

    features: int  # the VAE decoder's feature cache, kept between latent frames
    forward: int  # in a forward of the DiT
    decode: int  # while frames are decoded, with the feature cache and the frames before them
    encode: int  # while the first frame is encoded


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors created inside: ``now`` those still alive, ``peak`` the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


class _FusedAttention(TorchFunctionMode):
    """Attention without the matrix of all scores, as in every real kernel; the meta device's kernel allocates it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def peak_activations(
    config: DiTConfig, vae: StreamingVAE, size: FrameSize, latent_frames: int, dtype: torch.dtype, quantization: str
) -> PeakActivations:
    """For chunks of ``latent_frames`` at ``size``. Takes some tenths of a second, once per size."""
    # The cache's key is the VAE without weights: the real one would stay alive after its pipeline is gone.
    of_vae = _peaks_of_vae(vae.on_meta, size, latent_frames)
    return replace(of_vae, forward=_peak_of_forward(config, size, latent_frames, dtype, quantization))


@lru_cache(maxsize=8)
@torch.inference_mode()
def _peaks_of_vae(vae: StreamingVAE, size: FrameSize, latent_frames: int) -> PeakActivations:
    """Without the forward."""
    features = vae.new_features()
    latent = torch.empty(1, vae.z_dim, 1, size.latent_height, size.latent_width, device=_META)
    for _ in range(STEADY_FROM + 1):
        vae.decode_latent_frame(latent, features)

    def decode_two() -> None:
        for _ in range(2):
            pixels = vae.decode_latent_frame(latent, features)  # stays alive during the next decode, as in a chunk
            assert pixels.is_meta

    image = torch.empty(1, 3, size.height, size.width, device=_META)
    return PeakActivations(
        features=features.nbytes,
        forward=0,
        decode=_peak(decode_two),
        encode=_peak(lambda: vae.encode_condition(image, latent_frames)),
    )


@lru_cache(maxsize=8)
@torch.inference_mode()
def _peak_of_forward(
    config: DiTConfig, size: FrameSize, latent_frames: int, dtype: torch.dtype, quantization: str
) -> int:
    return _peak(_forward(config, size, latent_frames, dtype, quantization))


def _peak(work: Callable[[], object]) -> int:
    with _FusedAttention(), LiveBytes() as live:
        work()
    return live.peak


def _forward(
    config: DiTConfig, size: FrameSize, latent_frames: int, dtype: torch.dtype, quantization: str
) -> Callable[[], object]:
    """A forward of a DiT with one block: memory is the same at the start of every block."""
    config = replace(config, num_layers=1)
    with _META:
        dit = CausalDiT(config).to(dtype)
        if quantization == "fp8":
            for block in dit.blocks:
                quantize_linears(block)
        heads = (config.num_attention_heads, config.attention_head_dim)
        text_kv = [(torch.empty(1, config.text_len, *heads, dtype=dtype),) * 2]
        tokens = latent_frames * size.tokens_per_frame
        camera = [(torch.empty(1, tokens, config.dim, dtype=dtype),) * 2]
        shape = (1, config.in_channels, latent_frames, size.latent_height, size.latent_width)
        channels = torch.empty(shape, dtype=dtype)
    cache = KVCache(
        num_layers=1,
        num_heads=heads[0],
        head_dim=heads[1],
        tokens_per_frame=size.tokens_per_frame,
        sink_frames=0,
        window_frames=latent_frames,
        dtype=dtype,
        device=_META,
    )
    return lambda: dit(channels, 0.0, text_kv, camera, cache, 0)
