"""Pixels of a decoded latent frame -> uint8 on the host, in order, without blocking the device.

On a CPU, ``push`` hands out the frames itself. On an accelerator, ``push`` starts the copy to pinned memory. A thread
waits for each copy in turn and hands out the frames. The engine thread cannot: it launches the
context pass meanwhile, and it blocks whenever the launch queue is full, which is after about one forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from lingbot_rt.errors import UnsoundFrames
from lingbot_rt.models.transfer import to_host
from lingbot_rt.postprocess.stage import PostProcessor
from lingbot_rt.session.plan import FrameGroup


class FrameReadback:
    """Reads back the frames of one chunk. ``num_frames`` counts the pixel frames pushed.

    On an accelerator, ``emit`` is called on the readback's own thread. Leaving the context waits until everything
    pushed was handed out, and raises what ``emit`` raised, or UnsoundFrames: from the first group with values that are
    no picture on, nothing is handed out. The values are looked at on the device and come back with the frames.
    """

    def __init__(self, device: torch.device, postprocessor: PostProcessor, emit: Callable[[FrameGroup], None]) -> None:
        self._device = device
        self._postprocessor = postprocessor
        self._emit = emit
        self._waiter: ThreadPoolExecutor | None = None
        self._copies: list[Future[None]] = []
        self._bounds: tuple[Tensor, ...] = ()  # smallest and largest latent, on the device
        self._unsound: UnsoundFrames | None = None
        self.num_frames = 0

    def __enter__(self) -> FrameReadback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiter is not None:
            self._waiter.shutdown(cancel_futures=error is not None)
        if error is None:
            for handed_out in self._copies:
                handed_out.result()
            if self._unsound is not None:
                raise self._unsound

    def check(self, latents: Tensor) -> None:
        """The groups that follow are decoded from ``latents``: they are held back if these are not sound."""
        self._bounds = torch.aminmax(latents)

    def push(self, pixels: Tensor, chunk_index: int, group_index: int, num_groups: int) -> None:
        """``pixels`` [1, 3, n, H, W] in [0, 1] -> uint8 [n, H, W, 3], interpolated and upscaled as the session asked.

        Values are truncated, not rounded, as in the reference.
        """
        bounds = torch.stack([bound.float() for bound in (*torch.aminmax(pixels), *self._bounds)])
        frames = self._postprocessor.process(to_uint8(pixels))
        self.num_frames += frames.shape[0]
        place = (chunk_index, group_index, num_groups)
        if self._device.type != "cuda":
            self._hand_out(frames, bounds, place)
            return
        # Before the frames: the event of their end stands for both copies.
        host_bounds = to_host(bounds)
        host, copied = start_copy(frames)
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, thread_name_prefix="frames")
        self._copies.append(self._waiter.submit(self._await_copy, host, host_bounds, copied, place))

    def _await_copy(self, host: Tensor, bounds: Tensor, copied: torch.cuda.Event, place: tuple[int, int, int]) -> None:
        copied.synchronize()
        self._hand_out(host, bounds, place)

    def _hand_out(self, frames: Tensor, bounds: Tensor, place: tuple[int, int, int]) -> None:
        if self._unsound is not None:
            return
        fault = _fault(*bounds.tolist())
        if fault:
            self._unsound = UnsoundFrames(f"chunk {place[0]}: {fault}; its frames are not sent")
            return
        self._emit(FrameGroup(*place, pixels=frames.numpy()))


def start_copy(frames: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Starts the copy of ``frames`` to pinned host memory on the current stream; the copy and the event of its end."""
    host = to_host(frames)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def to_uint8(pixels: Tensor) -> Tensor:
    """[1, 3, n, H, W] in [0, 1] -> uint8 [n, H, W, 3], contiguous: 255 x truncated, not rounded."""
    scaled = (pixels[0].float() * 255).clamp_(0, 255).to(torch.uint8)
    return scaled.permute(1, 2, 3, 0).contiguous()


def _fault(darkest: float, brightest: float, smallest: float = 0.0, largest: float = 1.0) -> str:
    """What is wrong with pixels and latents of these bounds; empty when nothing is."""
    # NaN anywhere makes both bounds NaN.
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        return "the latents are not finite numbers (NaN or infinity)"
    if smallest == largest:
        return f"all latents have the same value ({smallest:g})"
    if not (math.isfinite(darkest) and math.isfinite(brightest)):
        return "the decoded pixels are not finite numbers (NaN or infinity)"
    return ""
