"""Which rank computes what. With one process every function here gives back what it was given.

The DiT takes nine tenths of a chunk: all ranks share it, by tokens and heads (``ulysses``). The picture of a session is
encoded by each rank for itself: nobody would be done sooner if the others waited for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_rt.models.dit import CausalDiT
from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import RankGroup, Ranks
from lingbot_rt.parallel.ulysses import UlyssesAttention
from lingbot_rt.parallel.vae_width import WidthShards


def share_dit(dit: CausalDiT, ranks: Ranks) -> None:
    if isinstance(ranks, RankGroup):
        dit.window_attention = UlyssesAttention(ranks)


def share_text(
    own: TextEncoder | None, ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> TextEncoder:
    """``own``: rank 0's, the others need none. ``shape`` is that of its embeddings; they come in ``dtype``."""
    if isinstance(ranks, RankGroup):
        return FirstRankText(ranks, own, torch.empty(shape, dtype=dtype, device=device))
    assert own is not None, "a rank alone encodes for itself"
    return own


class FirstRankText(TextEncoder):
    """In the text encoder's place on every rank: the first one encodes, the others get the 4 MB of embeddings.

    Encoding takes as long on one rank as on all at once, and the broadcast 0.1 ms. But UMT5-XXL is 11 GB in bfloat16:
    a copy a rank would be read P times at start, take P times the host memory when it rests there, and each prompt
    would then send P copies through the host's one memory at the same time.
    """

    def __init__(self, ranks: RankGroup, own: TextEncoder | None, like: Tensor) -> None:
        self._ranks = ranks
        self._own = own
        self._like = like

    def to(self, device: torch.device) -> FirstRankText:
        if self._own is not None:
            self._own.to(device)
        return self

    def knows(self, prompt: str) -> bool:
        return self._own is None or self._own.knows(prompt)

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, L, D] on the rank's device. Every rank has to ask, for the same prompts in the same order."""
        text = torch.empty_like(self._like)
        if self._own is not None:
            text.copy_(self._own.encode(prompt))
        self._ranks.broadcast(text)
        return text


class Decode:
    """Rank 0 decodes, on an accelerator beside the context pass; the others go on to that at once."""

    shards = 1
    """Ranks over which a session's features are spread."""

    def __init__(self, vae: StreamingVAE, ranks: Ranks) -> None:
        self._vae = vae
        self._ranks = ranks

    def __call__(self, latent: Tensor, features: FeatureCache) -> Tensor | None:
        """The next latent frame [1, z, 1, h, w] of a session -> on rank 0 pixels [1, 3, n, H, W] in [0, 1], float32."""
        return self._vae.decode_latent_frame(latent, features) if self._ranks.is_first else None


class WidthDecode(Decode):
    """All ranks decode, each its columns. Every one has to call it for every latent frame, in order."""

    def __init__(self, vae: StreamingVAE, ranks: RankGroup) -> None:
        super().__init__(vae, ranks)
        self.shards = ranks.world
        self._split = WidthShards(vae.decoder, ranks)

    def __call__(self, latent: Tensor, features: FeatureCache) -> Tensor | None:
        with self._split.of(latent.shape[-1]):
            pixels = self._vae.decode_latent_frame(latent, features)
        return pixels if self._ranks.is_first else None


def share_decode(vae: StreamingVAE, ranks: Ranks, how: str) -> Decode:
    """``how``: none or width, as ``--vae-parallel`` has it."""
    return WidthDecode(vae, ranks) if how == "width" and isinstance(ranks, RankGroup) else Decode(vae, ranks)
