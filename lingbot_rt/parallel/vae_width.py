"""The VAE's decode split over the ranks: each computes some columns of the picture, and rank 0 joins them.

Only two parts of the decoder look beyond a column: its 3-wide convolutions, which need one column of each neighbour,
and the attention of the mid block. The decoder up to the mid block, at the latents' own size, is under 2 % of a decode,
so every rank computes it whole. From the first up block on each rank computes its own columns.

Shapes: C channels, T frames, W columns of the picture at any of the decoder's sizes, w columns of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.parallel.groups import RankGroup


class WidthShards:
    """Splits ``decoder``, diffusers' own module, over ``ranks`` inside ``decoding``. Outside it decodes as before.

    The session's feature cache is split too, so either all latent frames of a session are decoded inside, or none.
    """

    def __init__(self, decoder: Any, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._columns: list[int] | None = None  # of each rank, at the latents' size; None outside ``decoding``
        self._number = len(_by_number)
        _by_number.append(self)
        decoder.mid_block.register_forward_hook(lambda module, args, whole: self._own_columns(whole))
        decoder.register_forward_hook(lambda module, args, own: self.join(own))
        decoder.conv_out = _with_halo(decoder.conv_out, self)
        for parent in list(decoder.up_blocks.modules()):
            for name, child in list(parent.named_children()):
                setattr(parent, name, _with_halo(child, self))

    @contextmanager
    def decoding(self, width: int) -> Iterator[None]:
        """A decode of latents ``width`` cells wide runs inside. With fewer cells than ranks, each rank decodes all."""
        self._columns = self._ranks.split(width) if width >= self._ranks.world else None
        try:
            yield
        finally:
            self._columns = None

    def widen(self, own: Tensor) -> Tensor:
        """[..., w] -> [..., w + 2]: one column of each neighbour, zeros beyond the picture."""
        if self._columns is None:
            return F.pad(own, (1, 1))
        return _compiled_widen(own, self._number) if torch.compiler.is_compiling() else self.exchange_columns(own)

    def join(self, own: Tensor) -> Tensor:
        """[..., w] of every rank -> [..., W] on rank 0; the other ranks keep their own."""
        if self._columns is None:
            return own
        return _compiled_join(own, self._number) if torch.compiler.is_compiling() else self.exchange_all(own)

    def exchange_columns(self, own: Tensor) -> Tensor:
        """``widen`` inside ``decoding``."""
        rank, world = self._ranks.rank, self._ranks.world
        # An all-to-all with rows for the neighbours only: in NCCL, a pair of sends and receives.
        rows = [int(abs(other - rank) == 1) for other in range(world)]
        edges = [own[..., 0]] if rank > 0 else []
        edges += [own[..., -1]] if rank + 1 < world else []
        sent = torch.stack(edges).contiguous()  # on a GPU the channels are innermost, and NCCL takes no strides
        received = torch.empty_like(sent)
        self._ranks.all_to_all(sent, received, rows, rows)
        wide = F.pad(own, (1, 1))
        if rank > 0:
            wide[..., 0] = received[0]
        if rank + 1 < world:
            wide[..., -1] = received[-1]
        return wide

    def _own_columns(self, whole: Tensor) -> Tensor:
        """[..., W] -> [..., w]"""
        if self._columns is None:
            return whole
        return whole.narrow(-1, sum(self._columns[: self._ranks.rank]), self._columns[self._ranks.rank])

    def exchange_all(self, own: Tensor) -> Tensor:
        """``join`` inside ``decoding``."""
        sent = own.movedim(-1, 0).contiguous()
        to_first = [len(sent) if rank == 0 else 0 for rank in range(self._ranks.world)]
        rows = self._joined_rows(own)
        received = sent.new_empty(sum(rows), *sent.shape[1:])
        self._ranks.all_to_all(sent, received, to_first, rows)
        # A new tensor, used on every rank: a compiler drops an operation whose result is not used.
        return received.movedim(0, -1).contiguous() if self._ranks.is_first else own.clone().contiguous()

    def joined_width(self, own: Tensor) -> int:
        """Columns of ``join``'s result on this rank."""
        return sum(self._joined_rows(own)) if self._ranks.is_first else own.shape[-1]

    def _joined_rows(self, own: Tensor) -> list[int]:
        """How many columns this rank receives from each rank."""
        assert self._columns is not None, "called inside decoding only"
        scale = own.shape[-1] // self._columns[self._ranks.rank]
        return [scale * count if self._ranks.is_first else 0 for count in self._columns]


# For torch.compile: as custom operations the exchanges do not break the decoder's graph.
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


class _HaloConv2d(nn.Module):
    """A 3-wide convolution whose outer columns come from ``shards``."""

    def __init__(self, conv: nn.Conv2d, shards: WidthShards) -> None:
        super().__init__()
        # The convolution pads the height. The halo pads the width.
        conv.padding = (1, 0)
        self.conv = conv
        self.shards = shards

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.shards.widen(x))


class _HaloConv3d(nn.Module):
    """The same for a causal convolution. ``cache_x``: the newest input frames, which come before ``x``."""

    def __init__(self, conv: nn.Conv3d, shards: WidthShards) -> None:
        super().__init__()
        # The convolution pads the height. The halo pads the width, the cached frames or zeros pad the time.
        conv.padding = (0, 1, 0)
        self.conv = conv
        self.shards = shards

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        frames = x if cache_x is None else torch.cat([cache_x, x], dim=2)
        wide = self.shards.widen(frames)
        missing = self.conv.kernel_size[0] - 1 - (frames.shape[2] - x.shape[2])
        if missing > 0:
            wide = F.pad(wide, (0, 0, 0, 0, missing, 0))
        return self.conv._conv_forward(wide, self.conv.weight, self.conv.bias)


def _with_halo(module: nn.Module, shards: WidthShards) -> nn.Module:
    """A 3-wide convolution with its halo; any other module as it is."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d) or module.kernel_size[-1] == 1:
        return module
    assert module.kernel_size[-2:] == (3, 3), f"{module} needs another halo than one column"
    return _HaloConv3d(module, shards) if isinstance(module, nn.Conv3d) else _HaloConv2d(module, shards)
