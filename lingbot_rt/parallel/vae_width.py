"""The VAE's decode split over the ranks: each computes some columns of the picture, and rank 0 joins them.

Only two parts of the decoder look beyond a column: its 3-wide convolutions and the attention of the mid block. Every
rank computes the decoder up to the mid block whole, at the latents' own size, which is under 2 % of a decode. From
there on it computes its own columns, and beside them a margin that its convolutions still have to see. A convolution
takes what lies beyond the margin for zeros, so the outermost columns are wrong from there on; they are cut off before
they matter. So the ranks exchange nothing until the pixels are there. At 832x480 two ranks compute 7 % more than their
half, and the slowest of four 27 % more than its quarter. To exchange single columns before each convolution, 28 times
per latent frame, took longer.

Shapes: W columns of the picture at any of the decoder's sizes, w columns of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor, nn

from lingbot_rt.parallel.groups import RankGroup


class _Level(NamedTuple):
    """A place in the decoder where columns are cut off."""

    scale: int  # columns here per column of the latents
    margin: int  # columns that the rest of the decoder still sees beside those it makes pixels of


class WidthShards:
    """Splits ``decoder``, diffusers' own module, over ``ranks`` inside ``decoding``. Outside it decodes as before.

    The session's feature cache is split too, so either all latent frames of a session are decoded inside, or none.
    """

    def __init__(self, decoder: Any, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._levels = _levels(decoder)
        self._width: int | None = None  # of the latents; None outside ``decoding``
        for number, module in enumerate((decoder.mid_block, *decoder.up_blocks, decoder)):
            module.register_forward_hook(lambda module, args, wide, number=number: self._kept(wide, number))

    @contextmanager
    def decoding(self, width: int) -> Iterator[None]:
        """A decode of latents ``width`` cells wide runs inside. With fewer cells than ranks, each rank decodes all."""
        self._width = width if width >= self._ranks.world else None
        try:
            yield
        finally:
            self._width = None

    def share(self, width: int) -> float:
        """The part of a decode, 0 to 1, that the rank with most columns computes, and of the features that it keeps."""
        if width < self._ranks.world:
            return 1.0
        levels = range(len(self._levels) - 2)  # with what the last two keep, at most conv_out computes: 0.2 %
        kept = [
            sum(end - start for start, end in (self._columns(rank, number, width) for number in levels))
            for rank in range(self._ranks.world)
        ]
        return max(kept) / sum(width * self._levels[number].scale for number in levels)

    def _columns(self, rank: int, number: int, width: int) -> tuple[int, int]:
        """Start and end of what ``rank`` keeps at a level. ``width``: of the latents."""
        scale, margin = self._levels[number]
        ends = list(accumulate(self._ranks.split(width), initial=0))
        return max(scale * ends[rank] - margin, 0), min(scale * ends[rank + 1] + margin, scale * width)

    def _kept(self, wide: Tensor, number: int) -> Tensor:
        """Cuts off what this rank does not keep at a level. ``wide``: what it kept one level before, or everything."""
        width, rank = self._width, self._ranks.rank
        if width is None:
            return wide
        start, end = self._columns(rank, number, width)
        if number > 0:
            before, _ = self._columns(rank, number - 1, width)
            offset = before * self._levels[number].scale // self._levels[number - 1].scale
        else:
            offset = 0
        return wide.narrow(-1, start - offset, end - start)


def join_columns(own: Tensor, width: int, ranks: RankGroup) -> Tensor:
    """The pixels [..., w] of every rank -> [..., W] on rank 0; the other ranks keep their own.

    ``width``: of the latents. With fewer cells than ranks, every rank has the whole picture already.
    """
    if width < ranks.world:
        return own
    columns = ranks.split(width)
    scale = own.shape[-1] // columns[ranks.rank]
    sent = own.movedim(-1, 0).contiguous()
    to_first = [len(sent) if rank == 0 else 0 for rank in range(ranks.world)]
    from_each = [scale * count if ranks.is_first else 0 for count in columns]
    received = sent.new_empty(sum(from_each), *sent.shape[1:])
    ranks.all_to_all(sent, received, to_first, from_each)
    return received.movedim(0, -1).contiguous() if ranks.is_first else own


def _levels(decoder: Any) -> list[_Level]:
    """After the mid block, after each up block, and after the decoder. Counted from the end: pixels need no margin."""
    scales = list(accumulate((2 if _upsampler(block) else 1 for block in decoder.up_blocks), int.__mul__, initial=1))
    margins = [0, _reach(decoder.conv_out)]
    for block in reversed(decoder.up_blocks):
        margin, upsampler = margins[-1], _upsampler(block)
        if upsampler is not None:
            margin = -(-(margin + _reach(upsampler)) // 2)  # it doubles the columns first
        margins.append(margin + _reach(block.resnets))
    return [_Level(*level) for level in zip([*scales, scales[-1]], reversed(margins), strict=True)]


def _upsampler(block: Any) -> nn.Module | None:
    """WanUpBlock has a list of one, WanResidualUpBlock the module; the last block has None."""
    module: nn.Module | None = block.upsamplers if hasattr(block, "upsamplers") else block.upsampler
    return module


def _reach(module: nn.Module) -> int:
    """Columns that convolutions one after another see beside their own."""
    convolutions = (part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    return sum(int(conv.kernel_size[-1]) // 2 for conv in convolutions)
