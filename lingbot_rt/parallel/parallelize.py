"""How the networks are spread over the ranks. With one process these functions change nothing.

The DiT takes nine tenths of a chunk's time: all ranks share it, by tokens and by heads (``ulysses``). They share the
decode by columns (``vae_width``). Each rank encodes the first frame by itself, as waiting for another rank would take
as long.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lingbot_rt.models.dit import CausalDiT
from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.text_encoder import PromptEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import RankGroup, Ranks
from lingbot_rt.parallel.peer_memory import open_peer_memory
from lingbot_rt.parallel.ulysses import UlyssesAttention
from lingbot_rt.parallel.vae_width import WidthShards, join_columns


def parallelize_dit(dit: CausalDiT, ranks: Ranks, device: torch.device, peer_memory: str) -> None:
    """Replaces the DiT's self-attention by Ulysses when there are several ranks. ``peer_memory``: auto or false."""
    if isinstance(ranks, RankGroup):
        peers = open_peer_memory(ranks, device) if peer_memory == "auto" else None
        dit.window_attention = UlyssesAttention(ranks, peers)


def parallelize_text_encoder(
    own: PromptEncoder | None, ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> PromptEncoder:
    """``own``: rank 0's encoder; None on the other ranks. ``shape`` and ``dtype`` are those of its embeddings."""
    if isinstance(ranks, RankGroup):
        return BroadcastTextEncoder(ranks, own, torch.empty(shape, dtype=dtype, device=device))
    assert own is not None, "a single rank needs its own encoder"
    return own


class BroadcastTextEncoder:
    """The PromptEncoder of several ranks: rank 0 encodes and broadcasts the embeddings, 4 MB for the 14B.

    Encoding takes as long on one rank as on all at once, and the broadcast takes 0.1 ms. UMT5-XXL is 11 GB in bfloat16:
    a copy per rank would be read P times at start, take P times the host memory when offloaded, and send P copies
    through the host's one memory for each prompt.
    """

    def __init__(self, ranks: RankGroup, own: PromptEncoder | None, like: Tensor) -> None:
        self._ranks = ranks
        self._own = own
        self._like = like

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, L, D] on the rank's device. All ranks must ask for the same prompts in the same order."""
        text = torch.empty_like(self._like)
        if self._own is not None:
            text.copy_(self._own.encode(prompt))
        self._ranks.broadcast(text)
        return text


class FrameDecoder(Protocol):
    """Decodes a session's latent frames, on one rank or on all."""

    def share(self, width: int) -> float:
        """The part of a decode, 0 to 1, that this rank computes and keeps features of; with several ranks the most
        that any of them does. ``width``: of the latents, in cells."""

    def __call__(self, latent: Tensor, features: FeatureCache) -> Tensor | None:
        """The next latent frame [1, z, 1, h, w] -> on rank 0 float32 pixels [1, 3, n, H, W] in [0, 1], else None."""


class FirstRankDecoder:
    """Rank 0 decodes. The other ranks begin the context pass and wait for it there."""

    def __init__(self, vae: StreamingVAE, ranks: Ranks) -> None:
        self._vae = vae
        self._ranks = ranks

    def share(self, width: int) -> float:
        return float(self._ranks.is_first)

    def __call__(self, latent: Tensor, features: FeatureCache) -> Tensor | None:
        return self._vae.decode_latent_frame(latent, features) if self._ranks.is_first else None


class WidthDecoder:
    """All ranks decode, each some columns of the picture. Every rank must call it for every latent frame, in order."""

    def __init__(self, vae: StreamingVAE, ranks: RankGroup) -> None:
        self._vae = vae
        self._ranks = ranks
        self._split = WidthShards(vae.decoder, ranks)

    def share(self, width: int) -> float:
        return self._split.share(width)

    def __call__(self, latent: Tensor, features: FeatureCache) -> Tensor | None:
        width = latent.shape[-1]
        with self._split.decoding(width):
            own = self._vae.decode_latent_frame(latent, features)
        pixels = join_columns(own, width, self._ranks)
        return pixels if self._ranks.is_first else None


def parallelize_decoder(vae: StreamingVAE, ranks: Ranks, how: str) -> FrameDecoder:
    """``how``: auto, none or width, the values of ``--vae-parallel``."""
    return WidthDecoder(vae, ranks) if how != "none" and isinstance(ranks, RankGroup) else FirstRankDecoder(vae, ranks)
