"""The DiT's training data: chunks of encoded trajectories with prompts, ray maps and positions in the session.

B samples of S chunks each. Chunk 0 is the first of its session. Chunks 1.. are consecutive; they follow chunk 0
directly or lie far later in the session.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.shapes import FrameSize
from scripts.world.config import CHUNK_FRAMES
from scripts.world.prompts import sample_prompt
from scripts.world.scene import LOOKS

FAR_SHARE = 0.35
"""Share of samples whose chunks 1.. lie far later, anywhere in the world: only the sink still holds the start."""

SWITCH_SHARE = 0.35
"""Share of samples in which the look changes."""

NO_CAMERA_SHARE = 0.08
"""Share of samples without ray maps, as in sessions without camera control."""

NUM_PROMPTS = 1536
MAX_SESSION_CHUNKS = 400
"""Chunks 1.. of a far sample begin before this chunk of their session."""


@dataclass(frozen=True, slots=True)
class TrajectoryBatch:
    """Inputs and ground truth of B samples of S chunks."""

    latents: Tensor  # [B, S, z, 3, h, w], the ground truth
    conditions: Tensor  # [B, S, 4 + z, 3, h, w]
    rays: Tensor  # [B, S, 384, 3, h, w]
    camera: Tensor  # [B], 1 with ray maps, 0 without
    prompts: Tensor  # [P, L, text_dim], the distinct ones
    prompt_of: Tensor  # [B, S], each chunk's row of prompts
    start_frames: Tensor  # [B, S], index of each chunk's first latent frame in its session
    weight: Tensor  # [B, S], loss weight: 0 where the chunks before are not in the sample


class TrajectoryDataset:
    """All encoded trajectories on the device, and encoded prompts of every look."""

    def __init__(self, folder: Path, text: TextEncoder, size: FrameSize, device: torch.device, seed: int) -> None:
        files = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
        if not files:
            raise FileNotFoundError(f"{folder} has no trajectories: run make_latents first")
        joined = {name: torch.cat([file[name] for file in files]) for name in files[0]}
        self._latents, self._first, self._later = (joined[name].to(device) for name in ("latents", "first", "later"))
        self._relative, self._looks = joined["relative"].numpy().astype(np.float64), joined["looks"].numpy()
        self._size, self._device = size, device
        rng = np.random.default_rng((seed, 3))
        prompts = [sample_prompt(rng) for _ in range(NUM_PROMPTS)]
        self._rows_of_look = [
            np.array([i for i, (_, of) in enumerate(prompts) if of == look]) for look in range(len(LOOKS))
        ]
        with torch.no_grad():
            self._prompts = torch.cat([text.encode(prompt).float() for prompt, _ in prompts])

    @property
    def num_trajectories(self) -> int:
        return len(self._latents)

    def sample(
        self, rng: np.random.Generator, count: int, num_chunks: int, *, from_start: bool = False
    ) -> TrajectoryBatch:
        """``count`` samples of ``num_chunks`` chunks. ``from_start``: consecutive from the first chunk, none far."""
        columns = zip(*(self._draw(rng, num_chunks, from_start) for _ in range(count)), strict=True)
        trajectory, view, stored, position, prompt, weight = (np.array(column) for column in columns)
        used, prompt_of = np.unique(prompt, return_inverse=True)
        frames = stored[..., None] * CHUNK_FRAMES + np.arange(CHUNK_FRAMES)
        return TrajectoryBatch(
            latents=self._chunks(trajectory, view, frames),
            conditions=self._conditions(trajectory, view),
            rays=self._rays(self._relative[trajectory[..., None], frames]),
            camera=self._tensor(rng.random(count) >= NO_CAMERA_SHARE).float(),
            prompts=self._prompts[self._tensor(used)],
            prompt_of=self._tensor(prompt_of.reshape(prompt.shape)),
            start_frames=self._tensor(CHUNK_FRAMES * position),
            weight=self._tensor(weight).float(),
        )

    def _draw(self, rng: np.random.Generator, num_chunks: int, from_start: bool) -> tuple[np.ndarray, ...]:
        """One sample: each chunk's trajectory, view of it (0 or 1), stored chunk, position, prompt and weight."""
        first, look, far = (rng.integers(high) for high in (self.num_trajectories, 2, self.num_trajectories))
        stored, position = np.arange(num_chunks), np.arange(num_chunks)
        trajectory, weight = np.full(num_chunks, first), np.ones(num_chunks)
        if not from_start and rng.random() < FAR_SHARE:
            later = np.arange(num_chunks - 1)
            stored[1:] = rng.integers(1, self._relative.shape[1] // CHUNK_FRAMES - num_chunks + 2) + later
            position[1:] = rng.integers(num_chunks, MAX_SESSION_CHUNKS) + later
            trajectory[1:] = far
            weight[1:3] = 0
        view = np.full(num_chunks, look)
        if rng.random() < SWITCH_SHARE:
            view[rng.integers(1, num_chunks) :] = 1 - look
        prompts = np.array([rng.choice(rows) for rows in self._rows_of_look])
        return trajectory, view, stored, position, prompts[self._looks[trajectory, view]], weight

    def _chunks(self, trajectory: np.ndarray, view: np.ndarray, frames: np.ndarray) -> Tensor:
        rows, views = (self._tensor(index)[..., None] for index in (trajectory, view))
        # Indices around a slice put their own dimensions first: B S 3 z h w.
        return self._latents[rows, views, :, self._tensor(frames)].float().transpose(2, 3)

    def _conditions(self, trajectory: np.ndarray, view: np.ndarray) -> Tensor:
        start = self._tensor(trajectory[:, 0]), self._tensor(view[:, 0])
        later = self._later[start].float()[:, None].expand(-1, view.shape[1] - 1, -1, -1, -1, -1)
        latents = torch.cat([self._first[start].float()[:, None], later], dim=1)
        mask = latents.new_zeros(*latents.shape[:2], MASK_CHANNELS, *latents.shape[3:])
        mask[:, 0, :, 0] = 1
        return torch.cat([mask, latents], dim=2)

    def _rays(self, relative_BS344: np.ndarray) -> Tensor:
        count, num_chunks = relative_BS344.shape[:2]
        rays = ray_map(relative_BS344.reshape(-1, 4, 4), self._size, self._device)
        return rays[0].unflatten(1, (count, num_chunks, CHUNK_FRAMES)).permute(1, 2, 0, 3, 4, 5)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
