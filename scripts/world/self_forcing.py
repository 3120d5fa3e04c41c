"""Self forcing: sessions in which the model continues from its own chunks, with the serving code's window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_rt.engine.dmd import denoise
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.models.dit import CameraModulation, CausalDiT, TextKV
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.shapes import PATCH_SIZE
from scripts.world.config import CHUNK_FRAMES
from scripts.world.teacher_forcing import camera_modulation_of
from scripts.world.training_data import SampleIndices, TrajectoryBatch, TrajectoryDataset


@dataclass(frozen=True, slots=True)
class Rollout:
    """B generated sessions: the inputs of each denoise step, and the resulting clean latents."""

    inputs: Tensor  # [B, S, steps, z, 3, h, w]
    latents: Tensor  # [B, S, z, 3, h, w]

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.latents for part in parts]))


class GeneratedChunks:
    """What the model made last of every stored chunk, at first the truth.

    Roll-outs continue from these chunks and replace them, so the errors in their contexts become as old as walks are
    long, at the cost of short roll-outs.
    """

    def __init__(self, dataset: TrajectoryDataset) -> None:
        self._dataset = dataset
        self._latents = dataset.latents.clone()

    def gather(self, indices: SampleIndices) -> Tensor:
        """[B, S, z, 3, h, w]"""
        return self._latents[self._dataset.places_of(indices)].float().transpose(2, 3)

    def put(self, indices: SampleIndices, latents: Tensor, given_B: Tensor) -> None:
        """Replaces the chunks of ``indices`` by ``latents``, but for the first ``given_B`` of each sample."""
        chunk = torch.arange(latents.shape[1], device=latents.device)
        is_given = (chunk < given_B[:, None])[:, :, None, None, None, None]
        places = self._dataset.places_of(indices)
        new = latents.transpose(2, 3).to(self._latents.dtype)
        self._latents[places] = torch.where(is_given, self._latents[places], new)


@dataclass(slots=True)
class _BatchForward:
    """The role of ``engine.dmd.ChunkForward``, for B sessions at once. Records the inputs of its forwards."""

    dit: CausalDiT
    cache: KVCache
    condition: Tensor
    text_kv: TextKV
    camera: CameraModulation
    start_frame: int
    inputs: list[Tensor]

    def flow(self, x: Tensor, timestep: float) -> Tensor:
        self.inputs.append(x)
        return self._forward(x, timestep).float()

    def commit(self, latents: Tensor) -> None:
        self._forward(latents, 0.0, commit=True)

    def _forward(self, x: Tensor, timestep: float, commit: bool = False) -> Any:
        channels = torch.cat([x, self.condition], dim=1)
        return self.dit(channels, timestep, self.text_kv, self.camera, self.cache, self.start_frame, commit=commit)


FAR_POSITION = 121
"""Chunk 1 of a far session is this one: a position at which the window's ring begins anew."""


@torch.no_grad()
def roll_out(
    dit: CausalDiT,
    batch: TrajectoryBatch,
    schedule: FlowSchedule,
    *,
    given: Tensor | None = None,
    given_B: Tensor | None = None,
    position: int = 1,
) -> Rollout:
    """Generates B sessions with the conditions, rays and prompts of ``batch``, chunk by chunk.

    The first ``given_B`` chunks of each session are replaced by those of ``given`` [B, S, z, 3, h, w] after they were
    generated, so that the later ones continue from them in the middle of a walk. ``position``: of chunk 1 in its
    session.
    """
    count, num_chunks, _, _, height, width = batch.latents.shape
    config, device = dit.config, batch.latents.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    cache = KVCache(
        num_layers=config.num_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        tokens_per_frame=(height // PATCH_SIZE) * (width // PATCH_SIZE),
        sink_frames=config.sink_frames,
        window_frames=config.window_frames,
        dtype=dtype,
        device=device,
        batch=count,
    )
    text_kv = dit.text_kv(batch.prompts)
    camera = camera_modulation_of(dit, batch)
    steps = schedule.steps_for(len(schedule.steps))
    inputs, latents = [], []
    for i in range(num_chunks):
        rows = batch.prompt_of[:, i]
        chunk = _BatchForward(
            dit,
            cache,
            batch.conditions[:, i],
            [(k[rows], v[rows]) for k, v in text_kv],
            [tuple(part.unflatten(0, (count, num_chunks))[:, i] for part in block) for block in camera],  # type: ignore[misc]
            CHUNK_FRAMES * (i and position + i - 1),
            [],
        )

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(count, *shape[1:], device=device)

        generated = denoise(chunk, schedule, len(steps), draw)  # type: ignore[arg-type]
        if given is not None and given_B is not None:
            generated = torch.where((given_B > i)[:, None, None, None, None], given[:, i], generated)
        latents.append(generated)
        chunk.commit(latents[-1])
        inputs.append(torch.stack(chunk.inputs, dim=1))
    return Rollout(torch.stack(inputs, dim=1), torch.stack(latents, dim=1))
