"""Pixels of a decoded latent frame -> uint8 on the host, in order, without holding up the device.

On a CPU a group is handed out inside ``push``. On an accelerator ``push`` only starts the copy to pinned memory on the
decode stream; a thread of the readback's own waits for each copy in turn and hands it out, while the engine thread is
still launching the context pass: the launch queue holds about a forward, and a full one would hold up the frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

from lingbot_rt.postprocess.stage import PostProcessor
from lingbot_rt.session.plan import FrameGroup


class FrameReadback:
    """One chunk's way out; ``num_frames`` counts the pixel frames pushed.

    On an accelerator ``emit`` is called on the readback's thread. Leaving it waits for all that was pushed, and raises
    what ``emit`` raised.
    """

    def __init__(self, device: torch.device, postprocessor: PostProcessor, emit: Callable[[FrameGroup], None]) -> None:
        self._device = device
        self._postprocessor = postprocessor
        self._emit = emit
        self._waiter: ThreadPoolExecutor | None = None
        self._on_their_way: list[Future[None]] = []
        self.num_frames = 0

    def __enter__(self) -> FrameReadback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiter is not None:
            self._waiter.shutdown(cancel_futures=error is not None)
        if error is None:
            for handed_out in self._on_their_way:
                handed_out.result()

    @contextmanager
    def decoding(self, latents: Tensor) -> Iterator[None]:
        """What runs inside goes to the decode stream, after ``latents`` are there."""
        if self._device.type != "cuda":
            yield
            return
        stream = _decode_stream(self._device)
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
        host, copied = start_copy(frames)
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, thread_name_prefix="frames")
        self._on_their_way.append(self._waiter.submit(self._hand_out, host, copied, place))

    def _hand_out(self, host: Tensor, copied: torch.cuda.Event, place: tuple[int, int, int]) -> None:
        copied.synchronize()
        self._emit(FrameGroup(*place, pixels=host.numpy()))


@cache
def _decode_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def start_copy(frames: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """``frames`` on their way to pinned host memory, behind the current stream's work, and the event of arrival."""
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
    host.copy_(frames, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def to_uint8(pixels: Tensor) -> Tensor:
    """[1, 3, n, H, W] in [0, 1] -> uint8 [n, H, W, 3], contiguous: 255 x truncated, not rounded."""
    scaled = (pixels[0].float() * 255).clamp_(0, 255).to(torch.uint8)
    return scaled.permute(1, 2, 3, 0).contiguous()
