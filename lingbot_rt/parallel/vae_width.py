"""The VAE's decode over the ranks: each computes some columns of the picture, and together they are the whole's.

Only two things in the decoder look beyond a column: its 3-wide convolutions, which need one column of each neighbour,
and the attention of the mid block. Up to there, at the latents' own size, is under 2 % of a decode, so every rank
computes it whole; from the first up block on each has its columns.

Shapes: C channels, T frames, W columns of the picture at any of the decoder's sizes, w those of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.models.vae import CausalConv3d
from lingbot_rt.parallel.groups import RankGroup


class WidthShards:
    """A decoder split over ``ranks`` while ``of`` is entered; outside it, it decodes whole as before.

    What the decoder keeps of a session (its feature cache) is then in shards too: of one session either all latent
    frames are decoded inside, or none.
    """

    def __init__(self, decoder: Any, ranks: RankGroup) -> None:
        self._ranks = ranks
        # On an accelerator a decode runs on its own stream: its exchanges must not line up with the context pass's.
        # One thread issues both, in the same order on every rank, so no two ranks wait for each other crosswise.
        self._group = ranks.new_group()
        self._columns: list[int] | None = None  # of each rank, where the mid block ends
        self._number = len(_by_number)
        _by_number.append(self)
        decoder.mid_block.register_forward_hook(lambda module, args, whole: self._own(whole))
        decoder.register_forward_hook(lambda module, args, own: self.join(own))
        for module in (*decoder.up_blocks.modules(), decoder.conv_out):
            _take_halo(module, self)

    @contextmanager
    def of(self, width: int) -> Iterator[None]:
        """For latents so many cells wide; fewer than ranks, and each rank decodes all."""
        self._columns = self._ranks.share(width) if width >= self._ranks.world else None
        try:
            yield
        finally:
            self._columns = None

    def widen(self, own: Tensor) -> Tensor:
        """[..., w] -> [..., w + 2]: a column of each neighbour, zeros beyond the picture."""
        if self._columns is None:
            return F.pad(own, (1, 1))
        return _compiled_widen(own, self._number) if torch.compiler.is_compiling() else self.exchange_columns(own)

    def join(self, own: Tensor) -> Tensor:
        """[..., w] of every rank -> [..., W] on rank 0; the others keep theirs."""
        if self._columns is None:
            return own
        return _compiled_join(own, self._number) if torch.compiler.is_compiling() else self.exchange_all(own)

    def exchange_columns(self, own: Tensor) -> Tensor:
        """What ``widen`` does in a decode that is split."""
        rank, world = self._ranks.rank, self._ranks.world
        # An all-to-all with nothing for all but the neighbours: to NCCL, a pair of sends and receives.
        rows = [int(abs(other - rank) == 1) for other in range(world)]
        edges = [own[..., 0]] if rank > 0 else []
        edges += [own[..., -1]] if rank + 1 < world else []
        sent = torch.stack(edges)
        received = torch.empty_like(sent)
        self._ranks.all_to_all(sent, received, rows, rows, self._group)
        wide = F.pad(own, (1, 1))
        if rank > 0:
            wide[..., 0] = received[0]
        if rank + 1 < world:
            wide[..., -1] = received[-1]
        return wide

    def _own(self, whole: Tensor) -> Tensor:
        """[..., W] -> [..., w]"""
        if self._columns is None:
            return whole
        return whole.narrow(-1, sum(self._columns[: self._ranks.rank]), self._columns[self._ranks.rank])

    def exchange_all(self, own: Tensor) -> Tensor:
        """What ``join`` does in a decode that is split."""
        sent = own.movedim(-1, 0).contiguous()
        to_first = [len(sent) if rank == 0 else 0 for rank in range(self._ranks.world)]
        rows = self._joined_rows(own)
        received = sent.new_empty(sum(rows), *sent.shape[1:])
        self._ranks.all_to_all(sent, received, to_first, rows, self._group)
        # New, and used, on every rank: a compiler drops an operation whose result is not.
        return received.movedim(0, -1).contiguous() if self._ranks.is_first else own.clone().contiguous()

    def joined_width(self, own: Tensor) -> int:
        """Columns of what ``join`` gives here."""
        return sum(self._joined_rows(own)) if self._ranks.is_first else own.shape[-1]

    def _joined_rows(self, own: Tensor) -> list[int]:
        """Columns that come from each rank."""
        assert self._columns is not None, "nothing is split"
        scale = own.shape[-1] // self._columns[self._ranks.rank]
        return [scale * count if self._ranks.is_first else 0 for count in self._columns]


# For torch.compile: to it an exchange is an operation like any other, and the decoder stays in one piece.
_by_number: list[WidthShards] = []


@torch.library.custom_op("lingbot_rt::widen", mutates_args=())
def _compiled_widen(own: Tensor, number: int) -> Tensor:
    return _by_number[number].exchange_columns(own)


@_compiled_widen.register_fake
def _(own: Tensor, number: int) -> Tensor:
    return F.pad(own, (1, 1))


@torch.library.custom_op("lingbot_rt::join", mutates_args=())
def _compiled_join(own: Tensor, number: int) -> Tensor:
    return _by_number[number].exchange_all(own)


@_compiled_join.register_fake
def _(own: Tensor, number: int) -> Tensor:
    return own.new_empty(*own.shape[:-1], _by_number[number].joined_width(own))


class _HaloConv3d(CausalConv3d):
    shards: WidthShards

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        frames = x if cache_x is None else torch.cat([cache_x, x], dim=2)
        wide = self.shards.widen(frames)
        # What a session has not got behind its first frames is zeros.
        missing = self.kernel_size[0] - 1 - (frames.shape[2] - x.shape[2])
        if missing > 0:
            wide = F.pad(wide, (0, 0, 0, 0, missing, 0))
        return self._conv_forward(wide, self.weight, self.bias)


class _HaloConv2d(nn.Conv2d):
    shards: WidthShards

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.shards.widen(x), self.weight, self.bias)


def _take_halo(module: Any, shards: WidthShards) -> None:
    """Lets a 3-wide convolution of diffusers' take its outer columns from ``shards``; others stay as they are."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d) or module.kernel_size[-1] == 1:
        return
    assert module.kernel_size[-2:] == (3, 3), f"a halo of one column is not what {module} needs"
    # The height's zeros are the convolution's own, the width's come with the halo, the frames' with the features.
    if isinstance(module, nn.Conv3d):
        module.__class__, module.padding = _HaloConv3d, (0, 1, 0)
    else:
        module.__class__, module.padding = _HaloConv2d, (1, 0)
    vars(module)["shards"] = shards
