"""The tensors of a snapshot. Each is checked when it is taken, while it is still on the host: a file may be anybody's.

Numbers are checked where one that is not finite would cost more than this session's frames: in what poses the camera,
and in the latents. Keys, values and features are too large for it. Frames that come out of NaN end their session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lingbot_rt.engine.history import WholeState
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import new_cache
from lingbot_rt.errors import InvalidInit
from lingbot_rt.models.vae import STEADY_FROM, StreamingVAE
from lingbot_rt.session.plan import SessionPlan
from lingbot_rt.shapes import FrameSize

_META = torch.device("meta")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Shape = tuple[int | None, ...]
"""None stands for any number."""


class WorldTensors:
    """Those of a file for a session of ``plan``. Methods raise InvalidInit with the field ``resume``."""

    def __init__(self, pipeline: Pipeline, plan: SessionPlan, tensors: Mapping[str, Tensor]) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._tensors = tensors
        self._cache = new_cache(pipeline, plan, _META)

    def latents(self, place: str) -> Tensor:
        """[1, z, F, h, w]"""
        size, config = self._plan.size, self._pipeline.dit.config
        shape = (1, config.out_channels, self._plan.latent_frames, size.latent_height, size.latent_width)
        return _finite(f"{place}.latents", self._take(f"{place}.latents", shape, *_FLOATS))

    def random_state(self, place: str) -> Tensor:
        """uint8 [n]. That of another device's generator is not used."""
        name = f"{place}.random_state"
        state = self._take(name, (None,), torch.uint8)
        generator = torch.Generator(self._pipeline.noise_device)
        if state.shape == generator.get_state().shape:
            try:
                generator.set_state(state)
            except RuntimeError:
                raise _refused(f"{name} is not that of a noise generator") from None
        return state

    def per_frame(self, name: str, *rest: int) -> Tensor | None:
        """float64 [F, *rest]; None when the file has none."""
        if name not in self._tensors:
            return None
        return _finite(name, self._take(name, (self._plan.latent_frames, *rest), torch.float64))

    def last_frame(self, place: str) -> Tensor | None:
        """uint8 [1, H, W, 3]; None when the file has none."""
        name, size = f"{place}.last_frame", self._plan.size
        return self._take(name, (1, size.height, size.width, 3), torch.uint8) if name in self._tensors else None

    def windows(self, place: str, frame: int) -> tuple[Tensor, ...]:
        """K/V [L, 2, 1, N, H, D] of one latent frame: of the window, or of both windows with guidance."""
        names = [f"{place}.{frame}.{number}" for number in range(2 if self._plan.guidance_scale > 1 else 1)]
        return tuple(self._take(name, self._cache.shape_of_frame, self._cache.dtype) for name in names)

    def features(self, place: str, given: Sequence[object]) -> list[Tensor | str | None]:
        """Of the VAE's decoder. ``given``: of each slot whether it is a tensor, or the text that it is."""
        half = self._pipeline.half_vae_of(self._plan)
        vae = (self._pipeline.vae if half is None else half.for_plans).on_meta
        known = next((slots for slots in _features(vae, self._plan.size) if _kinds(slots) == list(given)), None)
        if known is None:
            raise _refused(f"{place}.features has {len(given)} slots, expected those of this model's decoder")
        return [
            self._take(f"{place}.features.{i}", tuple(slot.shape), slot.dtype) if isinstance(slot, Tensor) else slot
            for i, slot in enumerate(known)
        ]

    def check_window(self, states: Sequence[WholeState], boundary: int) -> None:
        """Whether ``states``, of the window's chunks, fill a window as it can be at ``boundary``."""
        slots, expected = states[-1].frame_of_slot, self._plan.window_frames
        used = [frame for frame in slots if frame is not None]
        known = {*states[-1].again}.union(*(state.kv for state in states))
        if len(slots) != expected or len(set(used)) != len(used):
            raise _refused(f"frame_of_slot has {len(slots)} slots, expected {expected} with different frames")
        for slot, frame in enumerate(slots):
            if frame is None:
                continue
            if not (0 <= frame < boundary * self._plan.latent_frames and self._cache.may_hold(slot, frame)):
                raise _refused(f"frame_of_slot has frame {frame} in slot {slot}, where it cannot be")
            if frame not in known:
                raise _refused(f"frame_of_slot has frame {frame}, of which there are no keys and values")

    def _take(self, name: str, shape: Shape, *dtypes: torch.dtype) -> Tensor:
        expected = f"expected {' or '.join(map(_name, dtypes))} {_text(shape)}"
        tensor = self._tensors.get(name)
        if tensor is None:
            raise _refused(f"{name} is missing, {expected}")
        fits = tensor.dim() == len(shape) and all(
            size in (n, None) for n, size in zip(tensor.shape, shape, strict=True)
        )
        if not fits or tensor.dtype not in dtypes:
            raise _refused(f"{name} is {_name(tensor.dtype)} {_text(tuple(tensor.shape))}, {expected}")
        return tensor


@lru_cache(maxsize=8)
@torch.inference_mode()
def _features(vae: StreamingVAE, size: FrameSize) -> list[list[Tensor | str | None]]:
    """What the decoder keeps after one latent frame, and so on until it no longer changes. On the meta device."""
    features, kept = vae.new_features(), []
    latent = torch.empty(1, vae.z_dim, 1, size.latent_height, size.latent_width, device=_META)
    for _ in range(STEADY_FROM):
        vae.decode_latent_frame(latent, features)
        kept.append(features.slots)
    return kept


def _kinds(slots: Sequence[Tensor | str | None]) -> list[object]:
    return [slot if isinstance(slot, str) else slot is not None for slot in slots]


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise _refused(f"{name} has values that are not finite")
    return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(shape: Shape) -> str:
    return f"[{', '.join('n' if size is None else str(size) for size in shape[:8])}{', ...' if len(shape) > 8 else ''}]"


def _refused(problem: str) -> InvalidInit:
    return InvalidInit(f"the snapshot does not fit: {problem}", field="resume")
