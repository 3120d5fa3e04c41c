"""Ulysses sequence parallelism: a rank has some tokens of all heads, but in self-attention all tokens of some heads.

Shapes: B = 1 batch, N tokens of the chunk, n tokens of this rank, P ranks, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lingbot_rt.models.attention import ProjectedChunk, WindowAttention
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.peer_memory import PeerMemory


class Packing(NamedTuple):
    """q, k and v of a token's heads behind each other, as bytes: one exchange carries them, whatever their formats."""

    dtypes: tuple[torch.dtype, ...]  # the widest first, so that each part is aligned
    heads: int
    head_dim: int

    @property
    def nbytes(self) -> int:
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [self.heads * self.head_dim * dtype.itemsize for dtype in self.dtypes]

    def parts(self, packed: Tensor) -> list[Tensor]:
        """uint8 [..., nbytes] -> views [..., heads, head_dim] of each part."""
        split = zip(packed.split(self._sizes, dim=-1), self.dtypes, strict=True)
        return [part.view(dtype).unflatten(-1, (self.heads, self.head_dim)) for part, dtype in split]


class UlyssesAttention(WindowAttention):
    """WindowAttention with two all-to-alls per layer: one for q, k and v together, one for the attended values.

    A rank's window holds its own heads only. Cross-attention needs no exchange: every rank has the whole text. The
    exchanges run between the two halves of a block, in the current stream and in the same order on every rank.

    With ``peers``, fused blocks write q, k and v where the other ranks read them, and the attended values too.
    """

    def __init__(self, ranks: RankGroup, peers: PeerMemory | None = None) -> None:
        self._ranks = ranks
        self._peers = peers
        self.uses_peer_memory = peers is not None

    def missing_bytes(self, tokens: int, token_bytes: int) -> int:
        return 0 if self._peers is None else self._peers.missing_bytes(tokens * token_bytes // self._ranks.world)

    def own_tokens(self, x: Tensor, dim: int) -> Tensor:
        rows = self._ranks.split(x.shape[dim])
        return x.narrow(dim, sum(rows[: self._ranks.rank]), rows[self._ranks.rank])

    def all_tokens(self, own_BnK: Tensor, count: int) -> Tensor:
        return self._ranks.gather(own_BnK[0], self._ranks.split(count))[None]

    def store(self, k_BnHD: Tensor, v_BnHD: Tensor, cache: KVCache, layer: int) -> None:
        cache.write(layer, *self.to_heads(cache.chunk_tokens, k_BnHD, v_BnHD))

    def __call__(
        self, q_BnHD: Tensor, k_BnHD: Tensor, v_BnHD: Tensor, cache: KVCache, layer: int, backend: str
    ) -> Tensor:
        q, k, v = self.to_heads(cache.chunk_tokens, q_BnHD, k_BnHD, v_BnHD)
        return self.to_tokens(super().__call__(q, k, v, cache, layer, backend))

    @property
    def can_be_captured(self) -> bool:  # type: ignore[override]
        return self._peers is not None

    @property
    def layout(self) -> Hashable:
        return None if self._peers is None else self._peers.layout

    @contextmanager
    def recording(self) -> Iterator[Callable[[], None]]:
        assert self._peers is not None, "collectives are not captured"
        with self._ranks.recording() as replayed, self._peers.recording():
            yield replayed

    def store_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int) -> None:
        super().store_projected(chunk, cache, layer)
        if self._peers is not None:
            self._peers.even_out()  # every forward begins with the same place, so a captured one can be replayed

    def attend_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int, backend: str) -> Tensor:
        attended = super().attend_projected(chunk, cache, layer, backend)
        return self.to_tokens(attended) if self._peers is None else self._push_to_tokens(attended, self._peers)

    def _write_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int, q_dtype: torch.dtype) -> Tensor:
        """As for one process. k and v cross in the window's format, in fp8 half the bytes, and q in that of the kernel.

        They are written where they are sent from, or where they are received. k and v are copied from there into their
        slots.
        """
        heads, head_dim = chunk.shape[1:]
        packing = Packing((q_dtype, cache.dtype, cache.dtype), heads // self._ranks.world, head_dim)
        exchanged = self._exchange_projected if self._peers is None else self._push_projected
        q, k, v = packing.parts(exchanged(chunk, packing, cache.chunk_tokens))
        k_BSHD, v_BSHD = cache.layer(layer)
        chunk.store_rows(cache.rows, (k, k_BSHD[0]), (v, v_BSHD[0]))
        return q

    def _exchange_projected(self, chunk: ProjectedChunk, packing: Packing, count: int) -> Tensor:
        """q, k and v of all tokens for this rank's heads: uint8 [N, nbytes]."""
        shape = self._ranks.world, chunk.shape[0], packing.nbytes
        sent = torch.empty(shape, dtype=torch.uint8, device=chunk.device)
        q, k, v = (part.transpose(0, 1) for part in packing.parts(sent))
        chunk.write(q, k, v)
        return self.exchange_heads(sent, count)

    def _push_projected(self, chunk: ProjectedChunk, packing: Packing, count: int) -> Tensor:
        """``_exchange_projected`` through the peers' memory."""
        peers = self._peers
        assert peers is not None
        place = peers.place(count * packing.nbytes, count * packing.nbytes).view(count, packing.nbytes)
        # A rank's tokens are in the same rows on all ranks.
        q, k, v = packing.parts(self.own_tokens(place, 0))
        chunk.write(q, k, v, shifts_P=peers.shifts)
        peers.wait()
        return place

    def _push_to_tokens(self, attended_BNHD: Tensor, peers: PeerMemory) -> Tensor:
        """``to_tokens`` through the peers' memory."""
        world, (_, count, heads, head_dim) = self._ranks.world, attended_BNHD.shape
        rows = self._ranks.split(count)
        own = rows[self._ranks.rank]
        token_bytes = world * heads * head_dim * attended_BNHD.itemsize
        place = peers.place(own * token_bytes, max(rows) * token_bytes)
        to_nPK = place.view(attended_BNHD.dtype).view(own, world, heads * head_dim)
        peers.push_rows(attended_BNHD[0].flatten(1).contiguous(), to_nPK)
        return to_nPK.view(1, own, world * heads, head_dim)

    def to_heads(self, count: int, *own_BnHD: Tensor) -> tuple[Tensor, ...]:
        """Tensors [1, n, H, D] of this rank's tokens -> [1, N, H / P, D] of its heads, in one exchange."""
        world = self._ranks.world
        sent = torch.stack([x[0].unflatten(1, (world, -1)).transpose(0, 1) for x in own_BnHD], dim=2)
        return tuple(x[None] for x in self.exchange_heads(sent, count).unbind(1))

    def exchange_heads(self, sent_Pn: Tensor, count: int) -> Tensor:
        """What this rank's tokens have for each rank [P, n, ...] -> what all tokens have for this one [N, ...]."""
        world, own = sent_Pn.shape[:2]
        received = sent_Pn.new_empty(count, *sent_Pn.shape[2:])
        self._ranks.all_to_all(sent_Pn.flatten(0, 1), received, [own] * world, self._ranks.split(count))
        return received

    def to_tokens(self, attended_BNHD: Tensor) -> Tensor:
        """[1, N, H / P, D] of this rank's heads -> [1, n, H, D] of its tokens, in one exchange."""
        world, rows = self._ranks.world, self._ranks.split(attended_BNHD.shape[1])
        own = rows[self._ranks.rank]
        sent = attended_BNHD[0].contiguous()
        received = sent.new_empty(world * own, *sent.shape[1:])
        self._ranks.all_to_all(sent, received, rows, [own] * world)
        return received.unflatten(0, (world, own)).transpose(0, 1).flatten(1, 2)[None]
