"""Pixels of a decoded latent frame -> uint8 on the host, in order, without holding up the device.

On a CPU a group is handed out inside ``push``. On an accelerator ``push`` only starts the copy to pinned memory on the
decode stream; ``finish``, called once the context pass is launched, waits for each copy in turn and hands it out while
the device works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_rt.engine.chunk_plan import FrameGroup
from lingbot_rt.postprocess.stage import PostProcessor

_decode_streams: dict[torch.device, torch.cuda.Stream] = {}


@dataclass(slots=True)
class _Pending:
    host: Tensor  # pinned uint8 [n, H, W, 3]
    copied: torch.cuda.Event
    place: tuple[int, int, int]


class FrameOutlet:
    """One chunk's way out; ``num_frames`` counts the pixel frames pushed."""

    def __init__(self, device: torch.device, postprocessor: PostProcessor, emit: Callable[[FrameGroup], None]) -> None:
        self._device = device
        self._postprocessor = postprocessor
        self._emit = emit
        self._pending: list[_Pending] = []
        self.num_frames = 0

    @contextmanager
    def decoding(self, latents: Tensor) -> Iterator[None]:
        """What runs inside goes to the decode stream, after ``latents`` are there."""
        if self._device.type != "cuda":
            yield
            return
        stream = _decode_streams.setdefault(self._device, torch.cuda.Stream(self._device))
        stream.wait_stream(torch.cuda.current_stream(self._device))
        latents.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def push(self, pixels: Tensor, chunk_index: int, group_index: int, num_groups: int) -> None:
        """``pixels`` [1, 3, n, H, W] in [0, 1] leave as uint8 [n, H, W, 3], truncated as the reference does, then
        interpolated and enlarged as the session asked."""
        frames = self._postprocessor.process(to_uint8(pixels))
        self.num_frames += frames.shape[0]
        place = (chunk_index, group_index, num_groups)
        if self._device.type != "cuda":
            self._emit(FrameGroup(*place, pixels=frames.numpy()))
            return
        host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(frames, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending.append(_Pending(host, copied, place))

    def finish(self) -> None:
        """Hands out what is still on its way, in order."""
        for pending in self._pending:
            pending.copied.synchronize()
            self._emit(FrameGroup(*pending.place, pixels=pending.host.numpy()))
        self._pending.clear()


def to_uint8(pixels: Tensor) -> Tensor:
    """[1, 3, n, H, W] in [0, 1] -> uint8 [n, H, W, 3], contiguous: 255 x truncated, not rounded."""
    scaled = (pixels[0].float() * 255).clamp_(0, 255).to(torch.uint8)
    return scaled.permute(1, 2, 3, 0).contiguous()
