"""The DiT's training samples: chunks of the encoded walks, with prompts, rays and places in the session.

B samples, S slots: slot 0 is the first chunk of its session, slots 1.. are consecutive chunks, right after it or far
on.
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
from scripts.world.prompts import sample as sample_prompt
from scripts.world.scene import LOOKS

FAR_SHARE = 0.35
"""Samples whose slots 1.. lie far on in the session, anywhere in the world: only the sink remembers its start."""

SWITCH_SHARE = 0.35
NO_CAMERA_SHARE = 0.08
"""Samples without ray maps: a session may have no camera control."""

PROMPTS = 1536
MOST_CHUNKS = 400


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs and truth of B samples of S chunks."""

    latents: Tensor  # [B, S, z, 3, h, w], the truth
    conditions: Tensor  # [B, S, 4 + z, 3, h, w]
    rays: Tensor  # [B, S, 384, 3, h, w]
    camera: Tensor  # [B], 1 with ray maps and 0 without
    prompts: Tensor  # [P, L, text_dim], those that occur
    prompt_of: Tensor  # [B, S], rows of prompts
    start_frames: Tensor  # [B, S], each chunk's first latent frame in its session
    weight: Tensor  # [B, S], 0 where what the chunk follows is not in the sample


class Bank:
    """All encoded walks on the device, and prompts of every look, encoded once."""

    def __init__(self, folder: Path, text: TextEncoder, size: FrameSize, device: torch.device, seed: int) -> None:
        files = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
        if not files:
            raise FileNotFoundError(f"{folder} has no walks: run make_latents first")
        joined = {name: torch.cat([file[name] for file in files]) for name in files[0]}
        self._latents, self._first, self._later = (joined[name].to(device) for name in ("latents", "first", "later"))
        self._relative, self._looks = joined["relative"].numpy().astype(np.float64), joined["looks"].numpy()
        self._size, self._device = size, device
        rng = np.random.default_rng((seed, 3))
        drawn = [sample_prompt(rng) for _ in range(PROMPTS)]
        self._rows_of_look = [
            np.array([i for i, (_, of) in enumerate(drawn) if of == look]) for look in range(len(LOOKS))
        ]
        with torch.no_grad():
            self._prompts = torch.cat([text.encode(prompt).float() for prompt, _ in drawn])

    @property
    def walks(self) -> int:
        return len(self._latents)

    def sample(self, rng: np.random.Generator, count: int, slots: int, *, from_start: bool = False) -> Sample:
        """``from_start``: whole sessions from their first chunk, none far on."""
        walks, chunks = len(self._latents), self._relative.shape[1] // 3
        picks = {name: [] for name in ("walk", "seen", "chunk", "number", "prompt", "weight")}
        for _ in range(count):
            walk, view, other = rng.integers(walks), rng.integers(2), rng.integers(walks)
            chunk, number = np.arange(slots), np.arange(slots)
            of, weight = np.full(slots, walk), np.ones(slots)
            if not from_start and rng.random() < FAR_SHARE:
                far = rng.integers(1, chunks - slots + 2)
                chunk[1:] = far + np.arange(slots - 1)
                number[1:] = rng.integers(slots, MOST_CHUNKS) + np.arange(slots - 1)
                of[1:] = other
                weight[1:3] = 0
            seen = np.full(slots, view)
            if rng.random() < SWITCH_SHARE:
                seen[rng.integers(1, slots) :] = 1 - view
            rows = {look: rng.choice(self._rows_of_look[look]) for look in range(len(LOOKS))}
            for name, values in (
                ("walk", of),
                ("seen", seen),
                ("chunk", chunk),
                ("number", number),
                ("weight", weight),
            ):
                picks[name].append(values)
            picks["prompt"].append([rows[look] for look in self._looks[of, seen]])
        walk, seen, chunk, number, prompt = (
            np.array(picks[name]) for name in ("walk", "seen", "chunk", "number", "prompt")
        )
        used, prompt_of = np.unique(prompt, return_inverse=True)
        frames = chunk[..., None] * 3 + np.arange(3)
        return Sample(
            latents=self._chunks(walk, seen, frames),
            conditions=self._conditions(walk, seen, slots),
            rays=self._rays(self._relative[walk[..., None], frames]),
            camera=self._tensor(rng.random(count) >= NO_CAMERA_SHARE).float(),
            prompts=self._prompts[self._tensor(used)],
            prompt_of=self._tensor(prompt_of.reshape(prompt.shape)),
            start_frames=self._tensor(3 * number),
            weight=self._tensor(np.array(picks["weight"])).float(),
        )

    def _chunks(self, walk: np.ndarray, seen: np.ndarray, frames: np.ndarray) -> Tensor:
        at = [self._tensor(index)[..., None] for index in (walk, seen)]
        # Indices around a slice put their own dimensions first: B S 3 z h w.
        return self._latents[at[0], at[1], :, self._tensor(frames)].float().transpose(2, 3)

    def _conditions(self, walk: np.ndarray, seen: np.ndarray, slots: int) -> Tensor:
        start = self._tensor(walk[:, 0]), self._tensor(seen[:, 0])
        later = self._later[start].float()[:, None].expand(-1, slots - 1, -1, -1, -1, -1)
        latents = torch.cat([self._first[start].float()[:, None], later], dim=1)
        mask = latents.new_zeros(*latents.shape[:2], MASK_CHANNELS, *latents.shape[3:])
        mask[:, 0, :, 0] = 1
        return torch.cat([mask, latents], dim=2)

    def _rays(self, relative_BS344: np.ndarray) -> Tensor:
        count, slots = relative_BS344.shape[:2]
        rays = ray_map(relative_BS344.reshape(-1, 4, 4), self._size, self._device)
        return rays[0].unflatten(1, (count, slots, 3)).permute(1, 2, 0, 3, 4, 5)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
