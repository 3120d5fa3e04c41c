"""The DiT's training data: chunks of encoded trajectories with prompts, camera poses and positions in the session.

B samples of S chunks each. Chunk 0 is the first of its session. Chunks 1.. are consecutive; they follow chunk 0
directly or lie far later in the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.text_encoder import TextEncoder
from scripts.world.config import CHUNK_FRAMES
from scripts.world.prompts import sample_prompt
from scripts.world.scene import LOOKS

FAR_SHARE = 0.35
"""Share of samples whose chunks 1.. lie far later, anywhere in the world: only the sink still holds the start."""

SWITCH_SHARE = 0.35
"""Share of samples in which the look changes."""

NO_CAMERA_SHARE = 0.6
"""Share of the samples that stand still in which no ray maps are given, as in sessions without camera control."""

NUM_PROMPTS = 1536
MAX_SESSION_CHUNKS = 400
"""Chunks 1.. of a far sample begin before this chunk of their session."""


@dataclass(frozen=True, slots=True)
class TrajectoryBatch:
    """Inputs and ground truth of B samples of S chunks."""

    latents: Tensor  # [B, S, z, 3, h, w], the ground truth
    conditions: Tensor  # [B, S, 4 + z, 3, h, w]
    poses: Tensor  # [B, S, 3, 4, 4], relative to the frame before, as the ray maps take them
    places: Tensor  # [B, S, 3, 4]: x, z, yaw and pitch in the world, which the DiT is never told
    camera: Tensor  # [B], 1 with ray maps, 0 without
    prompts: Tensor  # [P, L, text_dim]
    prompt_of: Tensor  # [B, S], each chunk's row of prompts
    start_frames: Tensor  # [B, S], index of each chunk's first latent frame in its session
    weight: Tensor  # [B, S], loss weight: 0 where the chunks before are not in the sample

    def sessions(self, some: slice) -> TrajectoryBatch:
        """Some of the samples. ``prompts`` stay all: ``prompt_of`` counts on it."""
        parts = {each.name: getattr(self, each.name)[some] for each in fields(self) if each.name != "prompts"}
        return TrajectoryBatch(prompts=self.prompts, **parts)


@dataclass(frozen=True, slots=True)
class SampleIndices:
    """Which stored chunks and prompts make up a batch."""

    trajectory: Tensor  # [B, S]
    view: Tensor  # [B, S], 0 or 1: which of the trajectory's two looks
    chunk: Tensor  # [B, S], in the stored trajectory
    position: Tensor  # [B, S], in the session
    prompt: Tensor  # [B, looks], a prompt of every look
    camera: Tensor  # [B]
    weight: Tensor  # [B, S]
    start: Tensor  # [B], the stored start that is the first chunk; -1: the trajectory's own first chunk

    def to(self, device: torch.device) -> SampleIndices:
        return SampleIndices(*(getattr(self, field.name).to(device, copy=True) for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[SampleIndices]) -> SampleIndices:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def copy_(self, other: SampleIndices) -> None:
        """Overwrites the values, for functions that were captured with these tensors. Does not wait for the device."""
        for field in fields(self):
            target, source = getattr(self, field.name), getattr(other, field.name)
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


@dataclass(frozen=True, slots=True)
class StoredTrajectories:
    """N encoded trajectories of n latent frames: what make_latents describes, on the device."""

    latents: Tensor
    first: Tensor
    later: Tensor
    relative: Tensor
    places: Tensor
    looks: Tensor

    @classmethod
    def joined(cls, parts: Sequence[dict[str, Tensor]], device: torch.device) -> StoredTrajectories:
        return cls(*(torch.cat([part[field.name] for part in parts]).to(device) for field in fields(cls)))


class TrajectoryDataset:
    """All encoded trajectories on the device, and encoded prompts of every look."""

    def __init__(self, folder: Path, text: TextEncoder, device: torch.device, seed: int) -> None:
        files = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
        if not files:
            raise FileNotFoundError(f"{folder} has no trajectories: run make_latents first")
        if any("starts" not in file for file in files):
            raise ValueError(f"{folder} has files without starts, of an older version: delete it and run make_latents")
        self._walks, self._starts = (
            StoredTrajectories.joined([file[kind] for file in files], device) for kind in ("walks", "starts")
        )
        self._stands_still = (self._walks.relative.cpu() == torch.eye(4)).flatten(1).all(dim=1).numpy()
        rng = np.random.default_rng((seed, 3))
        prompts = [sample_prompt(rng) for _ in range(NUM_PROMPTS)]
        self._rows_of_look = [
            np.array([i for i, (_, of) in enumerate(prompts) if of == look]) for look in range(len(LOOKS))
        ]
        with torch.no_grad():
            self._prompts = torch.cat([text.encode(prompt).float() for prompt, _ in prompts]).to(device)

    @property
    def num_trajectories(self) -> int:
        return len(self._walks.latents)

    @property
    def latents(self) -> Tensor:
        """Of the walks, [N, 2, z, n, h, w], the truth."""
        return self._walks.latents

    def places_of(self, indices: SampleIndices) -> tuple[Tensor, Tensor, slice, Tensor]:
        """The index of the samples' latents in ``latents``. It gives [B, S, 3, z, h, w]."""
        rows = indices.trajectory
        frames = CHUNK_FRAMES * indices.chunk[..., None] + torch.arange(CHUNK_FRAMES, device=rows.device)
        # Indices around a slice put their own dimensions first.
        return rows[..., None], indices.view[..., None], slice(None), frames

    def draw(
        self,
        rng: np.random.Generator,
        count: int,
        num_chunks: int,
        *,
        far_share: float = FAR_SHARE,
        far_position: int | None = None,
    ) -> SampleIndices:
        """``count`` samples of ``num_chunks`` chunks. ``far_position``: of chunk 1 in the far ones; None: anywhere.

        Far ones begin with a start, unless they stand still.
        """
        first = rng.integers(self.num_trajectories, size=count)
        still = self._stands_still[first]
        chunks = np.arange(num_chunks)
        trajectory, chunk = np.tile(first[:, None], num_chunks), np.tile(chunks, (count, 1))
        position, weight = chunk.copy(), np.ones((count, num_chunks), dtype=np.float32)
        far = rng.random(count) < far_share
        # Who stands still sees the same place later.
        other = np.where(still, first, rng.integers(self.num_trajectories, size=count))
        trajectory[far, 1:] = other[far, None]
        stored = rng.integers(1, self._walks.relative.shape[1] // CHUNK_FRAMES - num_chunks + 2, size=count)
        later = rng.integers(num_chunks, MAX_SESSION_CHUNKS, size=count)
        if far_position is not None:
            later[:] = far_position
        for values, begin in ((chunk, stored), (position, later)):
            values[far, 1:] = begin[far, None] + chunks[:-1]
        weight[far, 1:3] = 0
        look = rng.integers(2, size=(count, 1))
        switch = np.where(rng.random(count) < SWITCH_SHARE, rng.integers(1, num_chunks, size=count), num_chunks)
        view = np.where(chunks >= switch[:, None], 1 - look, look)
        prompt = np.stack([rng.choice(rows, size=count) for rows in self._rows_of_look], axis=1)
        camera = 1 - (still & (rng.random(count) < NO_CAMERA_SHARE)).astype(np.float32)
        start = np.where(far & ~still, rng.integers(len(self._starts.latents), size=count), -1)
        return SampleIndices(*map(torch.from_numpy, (trajectory, view, chunk, position, prompt, camera, weight, start)))

    def gather(self, indices: SampleIndices) -> TrajectoryBatch:
        """The batch of ``indices``, which must be on the dataset's device."""
        walks, starts = self._walks, self._starts
        rows, view = indices.trajectory, indices.view
        *_, frames = places = self.places_of(indices)
        samples = torch.arange(len(rows), device=rows.device)[:, None]
        start, look = indices.start.clamp_min(0), view[:, 0]

        def begun(chunks: Tensor, of_start: Tensor) -> Tensor:
            """``chunks`` [B, S, ...], of which the first may be that of a start."""
            begins = (indices.start >= 0).view(-1, *[1] * (of_start.dim() - 1))
            first = torch.where(begins, of_start, chunks[:, 0])
            return torch.cat([first[:, None], chunks[:, 1:]], dim=1)

        def condition(name: str) -> Tensor:
            of_walk, of_start = (getattr(kind, name) for kind in (walks, starts))
            return begun(of_walk[rows[:, :1], view[:, :1]].float(), of_start[start, look].float())

        conditions = torch.cat([condition("first"), condition("later").expand(-1, rows.shape[1] - 1, *[-1] * 4)], dim=1)
        mask = conditions.new_zeros(*rows.shape, MASK_CHANNELS, *conditions.shape[3:])
        mask[:, 0, :, 0] = 1
        return TrajectoryBatch(
            latents=begun(walks.latents[places].transpose(2, 3).float(), starts.latents[start, look].float()),
            conditions=torch.cat([mask, conditions], dim=2),
            poses=begun(walks.relative[rows[..., None], frames], starts.relative[start]),
            places=begun(walks.places[rows[..., None], frames], starts.places[start]),
            camera=indices.camera,
            prompts=self._prompts[indices.prompt.flatten()],
            prompt_of=len(LOOKS) * samples + begun(walks.looks[rows, view], starts.looks[start, look]),
            start_frames=CHUNK_FRAMES * indices.position,
            weight=indices.weight,
        )
