"""Frame interpolation with RIFE's IFNet, version 4.0: the frame at any time between two frames.

Huang et al., "Real-Time Intermediate Flow Estimation for Video Frame Interpolation" (ECCV 2022). Four blocks work from
coarse to fine. Each refines the flow from the wanted time to both frames, and the mask that mixes the two warped
frames. Parameter names are the published checkpoints'.

Shapes: B pairs, H x W pixels, h x w a block's grid, n frames, r output frames per input frame. Flow is [B, 4, H, W] in
pixels: x and y to the first frame, then x and y to the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS = (8, 4, 2, 1)
"""How many times smaller each block sees the pair."""

_GRID_MULTIPLE = 4
"""A block halves its grid twice."""

_PAIRS_AT_ONCE = 4
"""Bounds the memory of a forward. A decoded group has four frames."""


def _conv_prelu(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, padding=1), nn.PReLU(channels_out))


class FlowBlock(nn.Module):
    """One refinement of flow and mask, at the block's own resolution."""

    def __init__(self, channels_in: int, width: int, convs: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_conv_prelu(channels_in, width // 2, 2), _conv_prelu(width // 2, width, 2))
        self.convblock = nn.Sequential(*(_conv_prelu(width, width, 1) for _ in range(convs)))
        self.lastconv = nn.ConvTranspose2d(width, 5, 4, 2, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """-> [B, 5, h/2, w/2]: the change of the flow, in pixels of this grid, and of the mask's logit."""
        x = self.conv0(x_BChw)
        return self.lastconv(x + self.convblock(x))


class IFNet(nn.Module):
    """``widths``: channels of each block, coarse to fine. ``convs``: convolutions in the middle of a block."""

    def __init__(self, widths: Sequence[int], convs: int) -> None:
        super().__init__()
        # Input channels: both frames and the time, in later blocks the mask and the flow so far too.
        for i, width in enumerate(widths):
            self.add_module(f"block{i}", FlowBlock(7 if i == 0 else 12, width, convs))

    def forward(self, first_B3HW: Tensor, second_B3HW: Tensor, time_B: Tensor, scale: float = 1.0) -> Tensor:
        """float32 frames in [0, 1] and times in (0, 1) -> float32 [B, 3, H, W], the frame at each time.

        ``scale`` is the resolution of the motion search relative to the frames: 0.5 finds larger motion in less time, 2
        finds smaller objects. The original repeats the search at half the resolution when it finds motion above 32
        pixels. Here the caller sets ``scale``, as that check would make the host wait for the device.

        Frames may have any size: each block resizes to its own grid, so nothing is padded. Convolutions run in the
        weights' dtype. Coordinates are float32: float16 places a pixel of a wide frame only to a quarter of a pixel.
        """
        size = (first_B3HW.shape[-2], first_B3HW.shape[-1])
        warped = torch.cat((first_B3HW, second_B3HW), dim=1)
        flow, mask = None, None
        for block, reduction in zip(self.children(), REDUCTIONS, strict=True):
            grid = _grid(size, reduction / scale)
            seen = [_resize(warped, grid), time_B.view(-1, 1, 1, 1).expand(-1, 1, *grid)]
            if flow is not None and mask is not None:
                seen += [_resize(mask, grid), _rescale(_resize(flow, grid), size, grid)]
            change = block(torch.cat(seen, dim=1).to(self.dtype)).float()
            half = (change.shape[-2], change.shape[-1])
            change = _resize(change, size)
            flow_change, mask_change = _rescale(change[:, :4], half, size), change[:, 4:]
            flow = flow_change if flow is None else flow + flow_change
            mask = mask_change if mask is None else mask + mask_change
            warped = torch.cat((_warp(first_B3HW, flow[:, :2]), _warp(second_B3HW, flow[:, 2:])), dim=1)
        assert mask is not None, "there are four blocks"
        share = torch.sigmoid(mask)
        return warped[:, :3] * share + warped[:, 3:] * (1 - share)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _grid(size: tuple[int, int], reduction: float) -> tuple[int, int]:
    """``size / reduction``, rounded up to a grid that a block can halve twice."""
    height, width = (_GRID_MULTIPLE * max(1, math.ceil(side / reduction / _GRID_MULTIPLE)) for side in size)
    return height, width


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _rescale(flow_B4HW: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Flow in pixels of a ``source`` (height, width) grid -> in pixels of ``target``."""
    # Filled on the device: a tensor built from numbers would be copied from the host.
    factors = flow_B4HW.new_empty((1, 4, 1, 1))
    factors[:, 0::2] = target[1] / source[1]
    factors[:, 1::2] = target[0] / source[0]
    return flow_B4HW * factors


def _warp(frame_B3HW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """Reads each pixel where the flow points, with bilinear sampling. Outside the frame the border repeats."""
    height, width = frame_B3HW.shape[-2:]
    x = torch.arange(width, device=flow_B2HW.device) + flow_B2HW[:, 0]
    y = torch.arange(height, device=flow_B2HW.device)[:, None] + flow_B2HW[:, 1]
    places = torch.stack((x * (2 / max(width - 1, 1)) - 1, y * (2 / max(height - 1, 1)) - 1), dim=-1)
    return F.grid_sample(frame_B3HW, places, mode="bilinear", padding_mode="border", align_corners=True)


class Interpolator:
    """A loaded network on its device, shared by every session."""

    def __init__(self, net: IFNet) -> None:
        self.net = net
        self.device = next(net.parameters()).device

    def __call__(self, frames_nHWC: Tensor, rate: int, scale: float) -> Tensor:
        """uint8 [n, H, W, 3] -> uint8 [n-1, r-1, H, W, 3]: from each frame to the next, at times 1/r ... (r-1)/r."""
        n, height, width, _ = frames_nHWC.shape
        each = rate - 1
        index = torch.arange((n - 1) * each, device=self.device)
        pair, time_B = index // each, (index % each + 1) / rate
        between = frames_nHWC.new_empty((len(index), height, width, 3))
        for i in range(0, len(index), _PAIRS_AT_ONCE):
            part = slice(i, i + _PAIRS_AT_ONCE)
            first = frames_nHWC[pair[part]].permute(0, 3, 1, 2).float() / 255
            second = frames_nHWC[pair[part] + 1].permute(0, 3, 1, 2).float() / 255
            picture = self.net(first, second, time_B[part], scale)
            between[part] = picture.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return between.view(n - 1, each, height, width, 3)

    def memory_bytes(self, height: int, width: int, scale: float) -> int:
        """Estimated peak bytes of one forward, without the weights."""
        # float32 at full size: two frames, both warped, flow and mask with their changes, coordinates.
        full = height * width * 36
        # The finest block: its input, then half its width at half the side, at most four bytes per value.
        finest = int(height * width * scale**2) * (12 + 16)
        return 4 * _PAIRS_AT_ONCE * (full + finest)
