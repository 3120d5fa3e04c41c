"""Fused blocks on two ranks give the flows of one: real exchanges over gloo, one thread per rank."""

from __future__ import annotations

import copy
import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lingbot_rt.models.attention import ProjectedChunk
from lingbot_rt.models.dit import CausalDiT
from lingbot_rt.models.fused_blocks import PlainOps
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import FP8, hadamard, to_float8
from lingbot_rt.parallel.peer_memory import SHIFT_BYTES, PeerMemory
from lingbot_rt.parallel.ulysses import UlyssesAttention
from tests.models.test_fused import chunks, random_dit, relative_rms, window
from tests.parallel.conftest import ThreadRank

WORLD = 2


class ExchangedWhole(UlyssesAttention):
    """q, k and v cross in the DiT's own format, and only the receiver rounds them."""

    def _write_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int, q_dtype: torch.dtype) -> Tensor:
        q, k, v = torch.empty(3, *chunk.shape, dtype=chunk.dtype)
        chunk.write(q, k, v)
        q, k, v = self.to_heads(cache.chunk_tokens, q[None], k[None], v[None])
        cache.write(layer, k, v)
        q = hadamard(q) if cache.dtype == FP8 else q
        return (to_float8(q) if q_dtype == FP8 else q)[0]


def at_address(address: int, like: Tensor) -> Tensor:
    """The memory at ``address``, with shape, strides and type of ``like``."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_uint8 * (span * like.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).as_strided(like.shape, like.stride())


class ShiftingOps(PlainOps):
    """Writes the heads of other ranks where ``shifts_P`` says, as the Triton kernel does."""

    def project_heads(self, qkv_N3D, weights, rope, eps, out, rows_N=None, shifts_P=None) -> None:
        if shifts_P is None:
            return super().project_heads(qkv_N3D, weights, rope, eps, out, rows_N)
        heads, head_dim = out[0].shape[1:]
        whole = tuple(torch.zeros(len(qkv_N3D), len(shifts_P), heads, head_dim, dtype=part.dtype) for part in out)
        super().project_heads(qkv_N3D, weights, rope, eps, whole)
        for rank, shift in enumerate(shifts_P.tolist()):
            for part, every in zip(out, whole, strict=True):
                at_address(part.data_ptr() + SHIFT_BYTES * shift, part).copy_(every[:, rank])
        return None


class SharedMemory(PeerMemory):
    """PeerMemory of threads: they write into each other's memory anyway. ``buffers``: of all ranks."""

    def __init__(self, ranks: ThreadRank, buffers: list[Tensor | None], barrier: threading.Barrier) -> None:
        super().__init__(ranks, torch.device("cpu"))
        self._buffers, self._barrier = buffers, barrier

    def _grow(self, place_bytes: int) -> None:
        self._place_bytes = -(-place_bytes // 64) * 64
        self._barrier.wait()
        self._buffer = self._buffers[self._ranks.rank] = torch.full((2 * self._place_bytes,), 255, dtype=torch.uint8)
        self._barrier.wait()
        addresses = [buffer.data_ptr() for buffer in self._buffers]
        self._shifts = (torch.tensor(addresses) - addresses[self._ranks.rank]) // SHIFT_BYTES

    def wait(self) -> None:
        self._barrier.wait()
        # What has been read may be written over: a late reader would see this.
        other = self._place_bytes * (not self._second)
        self._buffer[other : other + self._place_bytes] = 255
        self._barrier.wait()

    def push_rows(self, sent_NK: Tensor, to_nPK: Tensor) -> None:
        own = to_nPK[:, self._ranks.rank]
        for rank, rows in enumerate(sent_NK.split(self._ranks.split(len(sent_NK)))):
            address = own.data_ptr() + SHIFT_BYTES * int(self.shifts[rank])
            at_address(address, own[:1].expand(len(rows), -1).as_strided(rows.shape, own.stride())).copy_(rows)
        self.wait()


class Played(NamedTuple):
    """What a rank has after ``chunks``."""

    flows: Tensor
    cache: KVCache
    moved_bytes: int

    @property
    def kv_bytes(self) -> Tensor:
        return self.cache._kv_LSBNHD.view(torch.uint8)


def fused(dit: CausalDiT) -> CausalDiT:
    own = copy.deepcopy(dit)
    own.fuse_blocks(ShiftingOps())
    return own


def on_two_ranks(
    dit: CausalDiT, kept: torch.dtype, attention: type[UlyssesAttention], *, shared: bool = False
) -> list[Played]:
    store, buffers, barrier = dist.HashStore(), [None] * WORLD, threading.Barrier(WORLD, timeout=60)

    def play(rank: int) -> Played:
        with torch.inference_mode():
            own, ranks, cache = fused(dit), ThreadRank(rank, WORLD, store), window(dit, kept, heads=1)
            own.window_attention = attention(ranks, SharedMemory(ranks, buffers, barrier) if shared else None)
            flows, layout = chunks(own, cache), own.window_attention.layout
            assert layout == ((0, False) if shared else None), "a forward begins where the last one began"
            return Played(flows, cache, ranks.moved_bytes)

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(play, range(WORLD)))


@pytest.fixture
def fp8_kernel(monkeypatch) -> None:
    """A kernel that takes queries in fp8 too, as FlashAttention 3 does on Hopper."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.dtype == k.dtype == v.dtype
        return F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr("lingbot_rt.models.attention._flash_attention", lambda name: attend)


@pytest.mark.usefixtures("fp8_kernel")
@pytest.mark.parametrize(
    ("kept", "kernel"), [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (FP8, "sdpa"), (FP8, "fa3")]
)
@torch.inference_mode()
def test_two_ranks_are_one(kept, kernel):
    """Four chunks and their context passes, with 8 tokens and one head a rank, give the flows and windows of one
    process; and bit for bit those of an exchange before the rounding, which moves more bytes, and those of ranks that
    write into each other's memory. Queries in float32 are mixed in products of other sizes, and only nearly the
    same."""
    dit = random_dit()
    dit.attention_backend = kernel
    whole = window(dit, kept)
    flows = chunks(fused(dit), whole)
    ranks = on_two_ranks(dit, kept, UlyssesAttention)
    limit = 1e-5 if kept == torch.float32 else 1e-2
    for rank, got in enumerate(ranks):
        assert relative_rms(got.flows, flows) <= limit
        own = whole._kv_LSBNHD[..., rank : rank + 1, :]
        assert relative_rms(got.cache._kv_LSBNHD.float(), own.float()) <= limit
    for got, unrounded in zip(ranks, on_two_ranks(dit, kept, ExchangedWhole), strict=True):
        if (kept, kernel) == (FP8, "sdpa"):
            assert relative_rms(got.flows, unrounded.flows) <= 1e-6
        else:
            assert torch.equal(got.flows, unrounded.flows)
        assert torch.equal(got.kv_bytes, unrounded.kv_bytes)
        # 10 forwards of two layers send 4 tokens of a head: k and v in the window's format, q in the kernel's, or in
        # the window's where a context pass ends.
        q_calls = 20 if kernel == "fa3" else 6
        assert unrounded.moved_bytes - got.moved_bytes == (4 - kept.itemsize) * 4 * 32 * (2 * 20 + q_calls)
    for got, pushed in zip(ranks, on_two_ranks(dit, kept, UlyssesAttention, shared=True), strict=True):
        assert torch.equal(got.flows, pushed.flows)
        assert torch.equal(got.kv_bytes, pushed.kv_bytes)
        # Only the flows of all tokens are sent.
        assert pushed.moved_bytes < got.moved_bytes / 4
