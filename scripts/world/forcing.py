"""Teacher forcing without a mask, and roll-outs by the serving code.

The cached roll-out sees, at chunk i, the keys and values of the clean chunks 0, i-2, i-1 (sink 3, window 12 latent
frames) and its own. In training all chunks are there at once: each has a clean copy, at t = 0 and with those keys, and
a noisy copy that sees the same clean neighbours and itself. Concatenated keys instead of a mask keep attention dense;
the result is the cached roll-out's to rounding, which a test holds.

B samples, S slots (chunks), N tokens of a chunk, D width, H heads, d head_dim; the copies are stacked as 2 B S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_rt.engine.dmd import denoise
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.models.attention import attend
from lingbot_rt.models.dit import CameraModulation, CausalDiT, TextKV, unpatchify
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.rope import rope_tables
from lingbot_rt.shapes import PATCH_SIZE
from scripts.world.bank import MOST_CHUNKS, Sample

FRAMES = 3


def seen_by(slot: int) -> list[int]:
    """The clean slots that a slot attends to besides itself: the first chunk and the two before."""
    return sorted({0, slot - 2, slot - 1} & set(range(slot)))


def forward(dit: CausalDiT, sample: Sample, clean: Tensor, noisy: Tensor, timestep_BS: Tensor) -> Tensor:
    """Flow of every noisy chunk, [B, S, z, 3, h, w] like ``clean`` and ``noisy``."""
    count, slots = clean.shape[:2]
    channels = torch.cat([torch.stack([clean, noisy]), sample.conditions.expand(2, *sample.conditions.shape)], dim=3)
    x = dit.patch_embedding(channels.flatten(0, 2))
    timesteps = torch.stack([torch.zeros_like(timestep_BS), timestep_BS]).flatten()
    time = dit.time_modulation(timesteps)
    rope = rope_of(dit, sample, channels.shape[-2:])
    camera = camera_of(dit, sample)
    text_kv = dit.text_kv(sample.prompts.to(x.dtype))
    rows = sample.prompt_of.flatten()
    for i, block in enumerate(dit.blocks):
        q, k, v = dit.before_attention(block, x, time.projection_B6D, *(table.repeat(2, 1, 1) for table in rope))
        attended = attend_slots(*(part.unflatten(0, (2, count, slots)) for part in (q, k, v)), dit.attention_backend)
        modulation = tuple(part.repeat(2, 1, 1) for part in camera[i])
        text = tuple(part[rows].repeat(2, 1, 1, 1) for part in text_kv[i])
        x = dit.after_attention(block, x, attended, time.projection_B6D, modulation, text, dit.attention_backend)
    half = count * slots
    tokens = dit.head(x[half:], time.embedding_BD[half:])
    height, width = (side // PATCH_SIZE for side in channels.shape[-2:])
    return unpatchify(tokens, FRAMES, height, width).unflatten(0, (count, slots))


def attend_slots(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """[2, B, S, N, H, d] (clean, noisy) -> [2 B S, N, H, d]; slots that see equally many others go together."""
    slots = q.shape[2]
    parts = []
    for group in [[slot] for slot in range(min(3, slots))] + [list(range(3, slots))] * (slots > 3):
        others = torch.tensor([seen_by(slot) for slot in group], dtype=torch.long, device=q.device)
        keys = []
        for own in (k, v):
            context = own[0][:, others].flatten(2, 3)  # B, slots, tokens of all others, H, d
            keys.append(torch.cat([context.expand(2, *context.shape), own[:, :, group]], dim=3).flatten(0, 2))
        out = attend(q[:, :, group].flatten(0, 2), *keys, backend)
        parts.append(out.unflatten(0, (2, q.shape[1], len(group))))
    return torch.cat(parts, dim=2).flatten(0, 2)


def rope_of(dit: CausalDiT, sample: Sample, cells: torch.Size) -> tuple[Tensor, Tensor]:
    """Tables [B S, N, d / 2] of the chunks' places in their sessions."""
    height, width = (side // PATCH_SIZE for side in cells)
    head_dim = dit.config.attention_head_dim
    # All places there are: the same tables at every step, kept by their maker.
    last = FRAMES * (MOST_CHUNKS + sample.start_frames.shape[1])
    tables = rope_tables(head_dim, 0, last, height, width, sample.start_frames.device)
    frames = sample.start_frames.flatten()[:, None] + torch.arange(FRAMES, device=sample.start_frames.device)
    return tuple(table.unflatten(0, (last, height * width))[frames].flatten(1, 2) for table in tables)  # type: ignore[return-value]


def camera_of(dit: CausalDiT, sample: Sample) -> CameraModulation:
    """Scale and shift [B S, N, D] of every block; zeros leave a sample without camera as serving does."""
    keep = sample.camera.repeat_interleave(sample.rays.shape[1])[:, None, None]
    modulation = dit.camera_modulation(sample.rays.flatten(0, 1).to(dit.head.head.weight.dtype))
    return [(scale * keep.to(scale.dtype), shift * keep.to(shift.dtype)) for scale, shift in modulation]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the model made of B sessions: its inputs at each denoise step, and the clean latents it came to."""

    inputs: Tensor  # [B, S, steps, z, 3, h, w]
    latents: Tensor  # [B, S, z, 3, h, w]


@dataclass(slots=True)
class _Chunk:
    """Stands where ``engine.dmd.ChunkForward`` stands in serving, for B sessions at once, and keeps the inputs."""

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


@torch.no_grad()
def roll_out(dit: CausalDiT, sample: Sample, schedule: FlowSchedule) -> Rollout:
    """The model's own sessions from the sample's first chunks on: the serving code's denoise, DiT and window."""
    count, slots, _, _, height, width = sample.latents.shape
    config, device = dit.config, sample.latents.device
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
    text_kv = dit.text_kv(sample.prompts)
    camera = camera_of(dit, sample)
    steps = schedule.steps_for(len(schedule.steps))
    inputs, latents = [], []
    for slot in range(slots):
        rows = sample.prompt_of[:, slot]
        chunk = _Chunk(
            dit,
            cache,
            sample.conditions[:, slot],
            [(k[rows], v[rows]) for k, v in text_kv],
            [tuple(part.unflatten(0, (count, slots))[:, slot] for part in block) for block in camera],  # type: ignore[misc]
            FRAMES * slot,
            [],
        )

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(count, *shape[1:], device=device)

        latents.append(denoise(chunk, schedule, len(steps), draw))  # type: ignore[arg-type]
        chunk.commit(latents[-1])
        inputs.append(torch.stack(chunk.inputs, dim=1))
    return Rollout(torch.stack(inputs, dim=1), torch.stack(latents, dim=1))
