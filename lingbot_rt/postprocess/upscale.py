"""Upscaling: the two generators of Real-ESRGAN, from uint8 frames to larger uint8 frames.

Parameter names are the published checkpoints', so that their files load unchanged.
Shapes: B batch, C channels, H x W input pixels, s the network's factor, n frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAK = 0.2
_RESIDUAL = 0.2
"""The factor of a dense block's output, and of three such blocks', before it is added to the input."""


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class SRVGGNetCompact(nn.Module):
    """A stack of 3x3 convolutions at the input's resolution, whose output is added to the enlarged input.

    ``body`` alternates convolution and PReLU. The 3 s^2 channels of its last convolution become pixels.
    """

    def __init__(self, features: int, inner_convs: int, scale: int) -> None:
        super().__init__()
        self.features = features
        self.scale = scale
        layers: list[nn.Module] = [_conv3(3, features), nn.PReLU(features)]
        for _ in range(inner_convs):
            layers += [_conv3(features, features), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, _conv3(features, 3 * scale * scale))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, sH, sW], about [0, 1]."""
        detail = F.pixel_shuffle(self.body(x_BCHW), self.scale)
        return detail + F.interpolate(x_BCHW, scale_factor=float(self.scale), mode="nearest")

    def values_per_pixel(self) -> int:
        """Values in memory at once per input pixel: a convolution's input and output, then the enlarged frame."""
        return 3 * self.features + 5 * 3 * self.scale**2


class _DenseBlock(nn.Module):
    """Five convolutions. The input of each is the block's input and all outputs before."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = _conv3(features, growth)
        self.conv2 = _conv3(features + growth, growth)
        self.conv3 = _conv3(features + 2 * growth, growth)
        self.conv4 = _conv3(features + 3 * growth, growth)
        self.conv5 = _conv3(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat((seen, F.leaky_relu(conv(seen), _LEAK)), dim=1)
        return x + _RESIDUAL * self.conv5(seen)


class _ResidualOfDense(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = _DenseBlock(features, growth)
        self.rdb2 = _DenseBlock(features, growth)
        self.rdb3 = _DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + _RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """The large generator. It enlarges by 4; for factors 2 and 1 it first folds pixels into channels.

    ``fold`` is 1, 2 or 4 for factors 4, 2 and 1.
    """

    def __init__(self, features: int, growth: int, blocks: int, fold: int) -> None:
        super().__init__()
        self.features = features
        self.growth = growth
        self.fold = fold
        self.scale = 4 // fold
        self.conv_first = _conv3(3 * fold * fold, features)
        self.body = nn.Sequential(*(_ResidualOfDense(features, growth) for _ in range(blocks)))
        self.conv_body = _conv3(features, features)
        self.conv_up1 = _conv3(features, features)
        self.conv_up2 = _conv3(features, features)
        self.conv_hr = _conv3(features, features)
        self.conv_last = _conv3(features, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, sH, sW]. Sides that do not fold evenly are padded, and cropped again."""
        height, width = x_BCHW.shape[-2:]
        padded = F.pad(x_BCHW, (0, -width % self.fold, 0, -height % self.fold), mode="replicate")
        x = self.conv_first(F.pixel_unshuffle(padded, self.fold))
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), _LEAK)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), _LEAK))
        return x[..., : height * self.scale, : width * self.scale]

    def values_per_pixel(self) -> int:
        """Values in memory at once per input pixel, most of them in the last convolutions at full output size."""
        body = 2 * (2 * self.features + 4 * self.growth)
        return max(3 * self.features * self.scale**2, body // self.fold**2) + 3 * 3 * self.scale**2


class Upscaler:
    """A loaded network on its device, shared by every session."""

    def __init__(self, net: SRVGGNetCompact | RRDBNet) -> None:
        self.net = net
        weight = next(net.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def __call__(self, frames_nHWC: Tensor, scale: int) -> Tensor:
        """uint8 [n, H, W, 3] -> uint8 [n, scale H, scale W, 3], one frame at a time, as one keeps a device busy.

        A bicubic resize follows when ``scale`` is not the network's factor.
        """
        n, height, width, _ = frames_nHWC.shape
        larger = frames_nHWC.new_empty((n, height * scale, width * scale, 3))
        for i in range(n):
            larger[i] = self._enlarge(frames_nHWC[i], scale)
        return larger

    def _enlarge(self, frame_HWC: Tensor, scale: int) -> Tensor:
        height, width, _ = frame_HWC.shape
        # HWC memory viewed as CHW is channels-last, the layout of the weights.
        x = frame_HWC.permute(2, 0, 1)[None].to(self.dtype) / 255
        y = self.net(x)
        if self.net.scale != scale:
            y = F.interpolate(y, size=(height * scale, width * scale), mode="bicubic")
        return y[0].permute(1, 2, 0).mul(255).round_().clamp_(0, 255).to(torch.uint8)

    def memory_bytes(self, height: int, width: int, scale: int) -> int:
        """Estimated peak bytes of enlarging one frame, without the weights."""
        values = self.net.values_per_pixel() + (3 * 3 * scale**2 if scale != self.net.scale else 0)
        return height * width * values * self.dtype.itemsize
