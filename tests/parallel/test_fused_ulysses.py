"""Fused blocks on two ranks give the flows of one: real exchanges over gloo, one thread per rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_rt.models.fused_blocks import PlainOps
from lingbot_rt.models.quantize import FP8
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.ulysses import UlyssesAttention
from tests.models.test_fused import chunks, random_dit, relative_rms, window

WORLD = 2


class ThreadRank(RankGroup):
    """A rank in a thread, with a gloo group of its own."""

    def __init__(self, rank: int, store: dist.Store) -> None:
        super().__init__(rank, WORLD)
        self._gloo = dist.ProcessGroupGloo(store, rank, WORLD, timedelta(minutes=5))

    def all_to_all(
        self, sent: Tensor, received: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], group=None
    ):
        self._gloo.alltoall_base(received, sent, list(received_rows), list(sent_rows)).wait()

    def gather(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        received = own.new_empty(sum(rows), *own.shape[1:])
        self.all_to_all(torch.cat([own] * WORLD), received, [len(own)] * WORLD, rows)
        return received


@pytest.mark.parametrize("kept", [torch.float32, FP8])
@torch.inference_mode()
def test_two_ranks_are_one(kept):
    """Four chunks and their context passes, with 8 tokens and one head a rank."""
    dit = random_dit()
    expected = chunks(dit, window(dit, kept))
    store = dist.HashStore()

    def flows(rank: int) -> Tensor:
        with torch.inference_mode():
            own = copy.deepcopy(dit)
            own.fuse_blocks(PlainOps())
            own.window_attention = UlyssesAttention(ThreadRank(rank, store))
            return chunks(own, window(dit, kept, heads=1))

    with ThreadPoolExecutor(WORLD) as threads:
        for got in threads.map(flows, range(WORLD)):
            assert relative_rms(got, expected) <= (1e-2 if kept == FP8 else 1e-5)
