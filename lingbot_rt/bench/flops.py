"""Floating-point operations of one chunk, computed from the shapes. A multiply-add counts as two.

The count has the blocks' linears, self-attention over the window, cross-attention to the text and the camera's four
linears per block. It leaves out embeddings, norms and the head, which are under 1 % together.
"""

from __future__ import annotations

from dataclasses import dataclass

from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.shapes import FrameSize


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by kind of kernel."""

    linears: float = 0.0
    self_attention: float = 0.0
    cross_attention: float = 0.0

    @property
    def attention(self) -> float:
        return self.self_attention + self.cross_attention

    @property
    def total(self) -> float:
        return self.linears + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linears + other.linears,
            self.self_attention + other.self_attention,
            self.cross_attention + other.cross_attention,
        )

    def times(self, count: float) -> Flops:
        return Flops(self.linears * count, self.self_attention * count, self.cross_attention * count)


@dataclass(frozen=True, slots=True)
class ChunkFlops:
    """Operations of one chunk by stage."""

    camera: Flops
    denoise: Flops  # all steps
    context: Flops

    @property
    def dit(self) -> Flops:
        """Denoise and context: the work that ``dit_ms`` times."""
        return self.denoise + self.context


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What a chunk's operations depend on, apart from the model."""

    size: FrameSize
    latent_frames: int  # F, new in this chunk
    visible_frames: int  # latent frames attended to, the new ones included
    num_steps: int
    branches: int = 1  # 2 with classifier-free guidance

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.size.tokens_per_frame

    @property
    def keys(self) -> int:
        return self.visible_frames * self.size.tokens_per_frame


def block_flops(config: DiTConfig, tokens: int, keys: int) -> Flops:
    """One block of one forward: qkv and o, the cross-attention's q and o, the feed-forward, both attentions.

    The text's k and v are not included: they are computed once per prompt.
    """
    dim = config.dim
    return Flops(
        linears=2.0 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim),
        self_attention=4.0 * tokens * keys * dim,
        cross_attention=4.0 * tokens * config.text_len * dim,
    )


def chunk_flops(config: DiTConfig, shape: ChunkShape) -> ChunkFlops:
    """All operations of one chunk.

    Per chunk: four camera linears per block, one forward per step, and the context pass, whose last block stops after
    its K/V.
    """
    dim, tokens, layers = config.dim, shape.tokens, config.num_layers
    block = block_flops(config, tokens, shape.keys)
    last_qkv = Flops(linears=2.0 * tokens * 3 * dim * dim)
    return ChunkFlops(
        camera=Flops(linears=2.0 * tokens * 4 * dim * dim * layers),
        denoise=block.times(layers * shape.num_steps * shape.branches),
        context=(block.times(layers - 1) + last_qkv).times(shape.branches),
    )
