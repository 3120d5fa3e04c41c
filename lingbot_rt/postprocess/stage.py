"""The stage of a session between decode and transport: interpolation, then upscaling.

Interpolation comes first, so that the motion search runs at the decoded size.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_rt.errors import CheckpointError
from lingbot_rt.postprocess.interpolate import Interpolator
from lingbot_rt.postprocess.loader import INTERPOLATOR_FILE, UPSCALER_FILE, load_interpolator, load_upscaler
from lingbot_rt.postprocess.upscale import Upscaler
from lingbot_rt.session.messages import shown
from lingbot_rt.session.plan import PostprocessPlan
from lingbot_rt.shapes import VAE_TEMPORAL_STRIDE, FrameSize

log = logging.getLogger(__name__)


class PostProcessor:
    """One per session. It keeps the last frame, to interpolate from it to the first frame of the next call."""

    def __init__(
        self, plan: PostprocessPlan, size: FrameSize, upscaler: Upscaler | None, interpolator: Interpolator | None
    ) -> None:
        """``size`` is that of the decoded frames. A network is given exactly when the plan needs it."""
        assert (upscaler is not None) == plan.upscales, "an upscaler exactly when the plan upscales"
        assert (interpolator is not None) == plan.interpolates, "an interpolator exactly when the plan interpolates"
        self._plan = plan
        self._size = size
        self._upscaler = upscaler
        self._interpolator = interpolator
        self._last: Tensor | None = None
        self._marks: list[tuple[str, Any, Any]] = []

    @property
    def size_out(self) -> FrameSize:
        return self._plan.size_out(self._size)

    @property
    def last_frame(self) -> Tensor | None:
        """The decoded frame [1, H, W, 3] from which the next call interpolates; None before the first, and without."""
        return self._last

    def go_on_from(self, frame: Tensor | None) -> None:
        """``frame``, another time's ``last_frame`` on this device, is the one before the next call's."""
        self._last = frame if self._interpolator is not None else None

    @torch.inference_mode()
    def process(self, frames_nHWC: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> uint8 [plan.frames_out(n), sH, sW, 3] on the same device, in order of time.

        A decoded frame comes after the frames between it and the frame before. Without upscaling it is unchanged. On a
        GPU this only launches work on the current stream.
        """
        frames = frames_nHWC
        if self._interpolator is not None and len(frames):
            with self._timed("interpolate_ms", frames.device):
                frames = self._with_frames_between(frames, self._interpolator)
        if self._upscaler is not None:
            with self._timed("upscale_ms", frames.device):
                frames = self._upscaler(frames, self._plan.upscaling_scale)
        return frames

    def take_timings(self) -> dict[str, float]:
        """Milliseconds since the last call by step that ran: ``interpolate_ms``, ``upscale_ms``.

        On a GPU the caller must have synchronized with the work.
        """
        spent: dict[str, float] = defaultdict(float)
        for name, begin, end in self._marks:
            spent[name] += 1000 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
        self._marks.clear()
        return dict(spent)

    def memory_bytes(self) -> int:
        """Estimated peak bytes of a call for one decoded group, without the weights."""
        frames_in = VAE_TEMPORAL_STRIDE + 1
        group = self._plan.rate * frames_in * self._size.bytes_per_frame
        height, width = self._size.height, self._size.width
        needed = [0]
        if self._interpolator is not None:
            needed.append(2 * group + self._interpolator.memory_bytes(height, width, self._plan.interpolation_scale))
        if self._upscaler is not None:
            out = self._plan.rate * frames_in * self.size_out.bytes_per_frame
            needed.append(group + out + self._upscaler.memory_bytes(height, width, self._plan.upscaling_scale))
        return max(needed)

    def _with_frames_between(self, frames: Tensor, interpolator: Interpolator) -> Tensor:
        known = frames if self._last is None else torch.cat((self._last, frames))
        # A copy: the caller may overwrite the memory of its frames.
        self._last = frames[-1:].clone()
        between = interpolator(known, self._plan.rate, self._plan.interpolation_scale)
        steps = torch.cat((between, known[1:, None]), dim=1).flatten(0, 1)
        return steps if len(known) > len(frames) else torch.cat((known[:1], steps))

    @contextmanager
    def _timed(self, name: str, device: torch.device) -> Iterator[None]:
        begin = _mark(device)
        yield
        self._marks.append((name, begin, _mark(device)))


class PostprocessNetworks:
    """The networks on one device. Each file is loaded once, when a session first needs it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._upscalers: dict[Path | None, Upscaler] = {}
        self._interpolators: dict[Path | None, Interpolator] = {}

    def loaded(self, plan: PostprocessPlan) -> bool:
        """Whether the networks of ``plan`` are loaded."""
        upscaler = not plan.upscales or plan.upscaling_model in self._upscalers
        return upscaler and (not plan.interpolates or plan.interpolation_model in self._interpolators)

    def open(self, plan: PostprocessPlan, size: FrameSize) -> PostProcessor:
        """A session's processor.

        Raises CheckpointError, with the field of the init, when the file of a network is missing or does not fit. The
        message is for clients: it names no path of this machine. The log has the path and the reason.
        """
        with _for_clients("upscaling", plan.upscaling_model, plan.upscaling_given, UPSCALER_FILE):
            upscaler = self._upscaler(plan)
        with _for_clients("frame_interpolation", plan.interpolation_model, plan.interpolation_given, INTERPOLATOR_FILE):
            interpolator = self._interpolator(plan)
        return PostProcessor(plan, size, upscaler, interpolator)

    def warm_up(self, plan: PostprocessPlan, size: FrameSize) -> None:
        """Loads the plan's networks and runs the shapes of a session: the first frame alone, then a decoded group.

        Raises CheckpointError that names the file.
        """
        processor = PostProcessor(plan, size, self._upscaler(plan), self._interpolator(plan))
        for count in (1, VAE_TEMPORAL_STRIDE):
            processor.process(torch.zeros((count, size.height, size.width, 3), dtype=torch.uint8, device=self._device))

    def _upscaler(self, plan: PostprocessPlan) -> Upscaler | None:
        if not plan.upscales:
            return None
        if plan.upscaling_model not in self._upscalers:
            self._upscalers[plan.upscaling_model] = load_upscaler(plan.upscaling_model, self._device)
        return self._upscalers[plan.upscaling_model]

    def _interpolator(self, plan: PostprocessPlan) -> Interpolator | None:
        if not plan.interpolates:
            return None
        if plan.interpolation_model not in self._interpolators:
            self._interpolators[plan.interpolation_model] = load_interpolator(plan.interpolation_model, self._device)
        return self._interpolators[plan.interpolation_model]


@contextmanager
def _for_clients(kind: str, model: Path | None, given: str, expected: str) -> Iterator[None]:
    """Logs a CheckpointError raised inside and raises one that a client may read.

    ``kind``: ``upscaling`` or ``frame_interpolation``. ``given``: the client's name of ``model``.
    """
    try:
        yield
    except CheckpointError as error:
        log.warning("%s", error)
        if model is None:
            message = "the server's own network is missing or damaged: run scripts/fetch_models there"
            raise CheckpointError(message, field=f"enable_{kind}") from None
        message = f"{shown(given or model.name)} is damaged or another kind of file, expected {expected}"
        raise CheckpointError(message, field=f"{kind}_model_path") from None


def _mark(device: torch.device) -> Any:
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()
