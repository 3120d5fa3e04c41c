"""Few-step denoising of one chunk by distribution-matching distillation (DMD), and the clean context pass.

Shapes: x_BCFHW [1, z, F, h, w] latents; condition [1, 4 + z, F, h, w]. A forward's input has the channels of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_rt.engine.flow_match import CLEAN, FlowSchedule, predict_x0, renoise
from lingbot_rt.engine.history import KeptChunk
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models.dit import CameraModulation, CausalDiT, TextKV
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.transfer import to_device
from lingbot_rt.session.camera_path import Pose


@dataclass(frozen=True, slots=True)
class ChunkForward:
    """The DiT with one chunk's conditions: everything that a forward needs except the latents and the timestep."""

    dit: CausalDiT
    session: SessionState
    text_kv: TextKV
    camera: CameraModulation | None
    condition: Tensor  # [1, 4 + z, F, h, w]
    start_frame: int

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        session: SessionState,
        chunk_index: int,
        text_kv: TextKV,
        relative_poses: Pose | None,
        lenses: Pose | None,
    ) -> ChunkForward:
        """Of chunk ``chunk_index`` of the session, whose camera has these poses [F, 4, 4] and intrinsics [F, 4]."""
        camera, condition = session.camera(relative_poses, lenses), session.condition(chunk_index)
        return cls(pipeline.dit, session, text_kv, camera, condition, chunk_index * session.plan.latent_frames)

    def flow(self, x_BCFHW: Tensor, timestep: float) -> Tensor:
        """The velocity v. With guidance g > 1 it is u + g (c - u), c for the prompt and u for the negative prompt."""
        conditional = self._forward(x_BCFHW, timestep, self.text_kv, self.session.cache)
        if self.session.negative is None:
            return conditional
        unconditional = self._forward(x_BCFHW, timestep, self.session.negative.text_kv, self.session.negative.cache)
        return unconditional + self.session.plan.guidance_scale * (conditional - unconditional)

    def commit(self, latents_BCFHW: Tensor) -> None:
        """The context pass: a forward of the clean latents at t = 0, which writes their K/V into the window."""
        self._forward(latents_BCFHW, CLEAN, self.text_kv, self.session.cache, commit=True)
        if self.session.negative is not None:
            negative = self.session.negative
            self._forward(latents_BCFHW, CLEAN, negative.text_kv, negative.cache, commit=True)

    def commit_again(self, latents_BCFHW: Tensor) -> None:
        """``commit`` for another prompt. A negative prompt does not change, so its window stays as it is."""
        self._forward(latents_BCFHW, CLEAN, self.text_kv, self.session.cache, commit=True)

    def _forward(self, x: Tensor, timestep: float, text_kv: TextKV, cache: KVCache, commit: bool = False) -> Tensor:
        self.session.raise_if_cancelled()
        channels = torch.cat([x, self.condition], dim=1).to(self.session.dtype)
        time = self.session.time_modulation[timestep]
        return self.dit(channels, time, text_kv, self.camera, cache, self.start_frame, commit=commit)


def commit_again(pipeline: Pipeline, session: SessionState, chunk: KeptChunk, text_kv: TextKV) -> None:
    """Computes the K/V of an older chunk for another prompt."""
    ChunkForward.of(pipeline, session, chunk.index, text_kv, chunk.relative_poses, chunk.lenses).commit_again(
        to_device(chunk.latents, pipeline.device)
    )


def denoise(
    forward: ChunkForward, schedule: FlowSchedule, num_steps: int, draw: Callable[[tuple[int, ...]], Tensor]
) -> Tensor:
    """Noise -> the chunk's clean latents [1, z, F, h, w] in ``num_steps`` forwards.

    ``draw(shape)`` gives standard normal noise from the session's generator. The results depend on the order and shapes
    of the draws: first [1, z, F, h, w], then [1, F, z, h, w] before each step but the first.
    """
    steps = schedule.steps_for(num_steps)
    _, channels, frames, height, width = forward.condition.shape
    latent_channels = channels - MASK_CHANNELS
    x = draw((1, latent_channels, frames, height, width))
    for i, step in enumerate(steps):
        flow = forward.flow(x, step.timestep)
        x0 = predict_x0(x, flow, step.sigma)
        if i + 1 == len(steps):
            return x0
        noise = draw((1, frames, latent_channels, height, width)).transpose(1, 2)
        x = renoise(x0, noise.to(x0.dtype), steps[i + 1].sigma)
    raise AssertionError("a schedule has at least one step")
