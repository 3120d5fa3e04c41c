"""Teacher forcing: the flow of all chunks of a sample in one forward, each conditioned on the true chunks before it.

In the cached roll-out, chunk i sees the keys and values of clean chunks 0, i - 2, i - 1 (sink 3, window 12 latent
frames) and its own. Here every chunk has a clean copy, at t = 0, and a noisy copy. Both see the clean copies of chunks
0, i - 2, i - 1 and themselves. Their keys are concatenated, which needs no attention mask. The result equals the cached
roll-out's to rounding; a test holds this.

B samples, S chunks, N tokens per chunk, D width, H heads, d head_dim. The clean and noisy copies are stacked as 2 B S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_rt.models.attention import attend
from lingbot_rt.models.dit import RAY_CHANNELS, Block, CameraModulation, CausalDiT, TextKV, patchify, unpatchify
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.models.rope import rope_tables
from lingbot_rt.shapes import PATCH_SIZE, VAE_SPATIAL_STRIDE, FrameSize
from scripts.world.config import CHUNK_FRAMES
from scripts.world.training_data import MAX_SESSION_CHUNKS, TrajectoryBatch


def forward(
    dit: CausalDiT,
    batch: TrajectoryBatch,
    clean: Tensor,
    noisy: Tensor,
    timestep_BS: Tensor,
    layer: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Flow of every noisy chunk, [B, S, z, 3, h, w] like ``clean`` and ``noisy``, and the tokens [2, B, S, N, D] after
    each layer. ``layer``: a compiled run_layer."""
    count, num_chunks = clean.shape[:2]
    layer = layer or run_layer
    channels = torch.cat([torch.stack([clean, noisy]), batch.conditions.expand(2, *batch.conditions.shape)], dim=3)
    x = dit.patch_embedding(channels.flatten(0, 2))
    timesteps = torch.stack([torch.zeros_like(timestep_BS), timestep_BS]).flatten()
    time = dit.time_modulation(timesteps)
    rope = rope_of_chunks(dit, batch, channels.shape[-2:])
    camera = camera_modulation_of(dit, batch)
    text = text_of_chunks(dit, batch)
    hidden = []
    for block, modulation, text_kv in zip(dit.blocks, camera, text, strict=True):
        x = layer(block, x, time.projection_B6D, rope, modulation, text_kv, (count, num_chunks), dit.attention_backend)
        hidden.append(x.unflatten(0, (2, count, num_chunks)))
    half = count * num_chunks
    tokens = dit.head(x[half:], time.embedding_BD[half:])
    height, width = (side // PATCH_SIZE for side in channels.shape[-2:])
    flow = unpatchify(tokens, CHUNK_FRAMES, height, width).unflatten(0, (count, num_chunks))
    return flow, hidden


def run_layer(
    block: Block,
    x: Tensor,
    time_B6D: Tensor,
    rope: tuple[Tensor, Tensor],
    camera: tuple[Tensor, Tensor],
    text_kv: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    backend: str,
) -> Tensor:
    """A block on both copies, [2 B S, N, D]. ``shape`` is (B, S). Rope, camera and text have rows for one copy, B S.

    One function, so that compiled code never writes the second copy of these rows to memory.
    """
    both = [torch.cat([part, part]) for part in (*rope, *camera, *text_kv)]
    q, k, v = block.before_attention(x, time_B6D, both[0], both[1])
    attended = attend_chunks(*(part.unflatten(0, (2, *shape)) for part in (q, k, v)), backend)
    return block.after_attention(x, attended, time_B6D, (both[2], both[3]), (both[4], both[5]), backend)


def text_of_chunks(dit: CausalDiT, batch: TrajectoryBatch) -> TextKV:
    """Cross-attention keys and values [B S, L, H, d] of every block.

    A matrix picks each chunk's prompt: the backward pass of an index would add up rows one by one.
    """
    text_kv = dit.text_kv(batch.prompts.to(dit.head.head.weight.dtype))
    prompts = torch.arange(len(batch.prompts), device=batch.prompts.device)
    picks = (batch.prompt_of.flatten()[:, None] == prompts).to(text_kv[0][0].dtype)
    return [tuple((picks @ part.flatten(1)).unflatten(1, part.shape[1:]) for part in kv) for kv in text_kv]  # type: ignore[misc]


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Attention of the clean and noisy copies of all chunks, [2, B, S, N, H, d] each -> [2 B S, N, H, d].

    Chunks with equally many context chunks, which are all from the fourth on, are attended to together.
    """
    num_chunks = q.shape[2]
    parts = []
    for begin, end in [(i, i + 1) for i in range(min(3, num_chunks))] + [(3, num_chunks)] * (num_chunks > 3):
        group = slice(begin, end)
        keys = [_with_context(own, begin, end).flatten(0, 2) for own in (k, v)]
        out = attend(q[:, :, group].flatten(0, 2), *keys, backend)
        parts.append(out.unflatten(0, (2, q.shape[1], end - begin)))
    return torch.cat(parts, dim=2).flatten(0, 2)


def _with_context(own: Tensor, begin: int, end: int) -> Tensor:
    """[2, B, S, N, ...] -> [2, B, end - begin, M, ...]: the clean tokens of the first chunk and of the two before each
    chunk, where there are such chunks, and then its own tokens."""
    clean = own[0]
    contexts = [clean[:, begin - back : end - back] for back in (2, 1) if begin - back > 0]
    if begin > 0:
        contexts.insert(0, clean[:, :1].expand(-1, end - begin, *[-1] * (clean.dim() - 2)))
    together = [context.expand(2, *context.shape) for context in contexts]
    return torch.cat([*together, own[:, :, begin:end]], dim=3)


def rope_of_chunks(dit: CausalDiT, batch: TrajectoryBatch, cells: torch.Size) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B S, N, d / 2] at the chunks' positions in their sessions."""
    height, width = (side // PATCH_SIZE for side in cells)
    head_dim = dit.config.attention_head_dim
    # Tables of all positions: the same arguments at every step, so rope_tables caches them.
    last = CHUNK_FRAMES * (MAX_SESSION_CHUNKS + batch.start_frames.shape[1])
    tables = rope_tables(head_dim, 0, last, height, width, batch.start_frames.device)
    frames = batch.start_frames.flatten()[:, None] + torch.arange(CHUNK_FRAMES, device=batch.start_frames.device)
    return tuple(table.unflatten(0, (last, height * width))[frames].flatten(1, 2) for table in tables)  # type: ignore[return-value]


def camera_modulation_of(dit: CausalDiT, batch: TrajectoryBatch) -> CameraModulation:
    """Scale and shift [B S, N, D] of every block. They are zero in samples without camera, which changes nothing.

    A ray map is linear in the 12 numbers of its pose. So the ray maps of 12 unit poses are embedded, and a frame's
    embedding is their sum, weighted with its pose: the maps of all frames would be the largest tensors of the step.
    """
    embedding = dit.patch_embedding_wancamctrl
    height, width = batch.latents.shape[-2:]
    with torch.autocast(batch.poses.device.type, enabled=False):
        basis = F.linear(unit_ray_maps(height, width, batch.poses.device), embedding.weight.float())
        numbers = batch.poses[..., :3, :].flatten(3).flatten(0, 2).float()  # B S 3, 12
        embedded = (numbers @ basis.flatten(1)).unflatten(1, basis.shape[1:]) + embedding.bias
    chunks = embedded.unflatten(0, (-1, CHUNK_FRAMES)).flatten(1, 2)
    keep = batch.camera.repeat_interleave(batch.poses.shape[1])[:, None, None]
    modulation = list(dit.modulation_of_rays(chunks.to(dit.head.head.weight.dtype)))
    return [(scale * keep.to(scale.dtype), shift * keep.to(shift.dtype)) for scale, shift in modulation]


@lru_cache
def unit_ray_maps(height: int, width: int, device: torch.device) -> Tensor:
    """The ray maps, as patches [12, tokens, 1536], of the 12 "poses" that have a single 1 in their upper three rows.

    ``height`` and ``width`` are in latent cells.
    """
    units = np.zeros((12, 4, 4))
    units[np.arange(12), np.arange(12) // 4, np.arange(12) % 4] = 1
    size = FrameSize(VAE_SPATIAL_STRIDE * width, VAE_SPATIAL_STRIDE * height)
    return patchify(ray_map(units, size, device)).view(12, -1, RAY_CHANNELS * PATCH_SIZE**2)
