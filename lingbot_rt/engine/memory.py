"""What a session takes on the device, counted before it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lingbot_rt.engine.chunk_plan import SessionPlan
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.errors import CapacityError
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.shapes import FrameSize

GB = 1e9
_PROBE_SIZE = FrameSize(64, 64)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one session, the weights (already there) left out."""

    window_bytes: int  # K/V of the whole window, twice with guidance
    features_bytes: int  # the VAE decoder's feature cache
    activations_bytes: int  # the largest of a forward and a decode, and what lives through a chunk
    postprocess_bytes: int  # of upscaling and interpolation, which run beside the forward

    @property
    def total_bytes(self) -> int:
        return self.window_bytes + self.features_bytes + self.activations_bytes + self.postprocess_bytes


def window_bytes(config: DiTConfig, size: FrameSize, window_frames: int, dtype: torch.dtype) -> int:
    """K and V of every layer for ``window_frames`` latent frames: 1.278 GB a frame for the 14B at 832x480 in bf16."""
    width = config.num_attention_heads * config.attention_head_dim
    return 2 * config.num_layers * width * dtype.itemsize * window_frames * size.tokens_per_frame


@torch.inference_mode()
def feature_bytes_per_pixel(pipeline: Pipeline) -> float:
    """Bytes of the VAE's feature cache a pixel of the picture, read off a small decode (they are proportional)."""
    features = pipeline.vae.new_features()
    shape = (1, pipeline.vae.z_dim, 1, _PROBE_SIZE.latent_height, _PROBE_SIZE.latent_width)
    with pipeline.vae_placement.at_work():
        # After three latent frames every convolution keeps its full two frames.
        for _ in range(3):
            pipeline.vae.decode_latent_frame(torch.zeros(shape, device=pipeline.device), features)
    return features.nbytes / _PROBE_SIZE.pixels


def plan_memory(pipeline: Pipeline, plan: SessionPlan, features_per_pixel: float) -> MemoryPlan:
    """Of rank 0, which decodes; the other ranks take as much less. Loads the upscaling and interpolation networks that
    ``plan`` asks for; raises InvalidInit when they do not load.
    """
    config = pipeline.dit.config
    branches = 2 if plan.guidance_scale > 1 else 1
    world = pipeline.ranks.world
    tokens = -(-plan.latent_frames * plan.size.tokens_per_frame // world)
    width = config.num_attention_heads * config.attention_head_dim
    camera = 2 * config.num_layers * tokens * width * pipeline.dtype.itemsize
    forward = tokens * (2 * config.ffn_dim + 8 * width) * 4
    features = int(features_per_pixel * plan.size.pixels) // pipeline.decode.shards
    return MemoryPlan(
        window_bytes=branches * window_bytes(config, plan.size, plan.window_frames, pipeline.dtype) // world,
        features_bytes=features,
        # A decode's largest activations are of the order of the features it leaves behind.
        activations_bytes=camera + forward + features,
        postprocess_bytes=pipeline.open_postprocessor(plan).memory_bytes(),
    )


def require_room(pipeline: Pipeline, plan: SessionPlan, features_per_pixel: float) -> MemoryPlan:
    """Raises CapacityError with the numbers, and the window that would fit, when the session is too large."""
    needed = plan_memory(pipeline, plan, features_per_pixel)
    free = free_bytes(pipeline.device)
    if pipeline.device.type == "cpu":
        # Every rank takes its share of the same memory.
        free //= pipeline.ranks.world
    if needed.total_bytes <= free:
        return needed
    per_frame = needed.window_bytes // plan.window_frames
    fitting = (free - needed.total_bytes + needed.window_bytes) // per_frame
    smallest = plan.sink_frames + plan.latent_frames
    fix = f"use window <= {fitting}" if fitting >= smallest else "use a smaller size"
    if needed.postprocess_bytes:
        fix += f", or do without upscaling and interpolation ({needed.postprocess_bytes / GB:.1f} GB)"
    raise CapacityError(
        f"window {plan.window_frames} at {plan.size} needs {needed.total_bytes / GB:.1f} GB, "
        f"{free / GB:.1f} GB is free: {fix}",
        field="realtime_causal_kv_cache_num_frames",
    )


def describe_share(pipeline: Pipeline) -> str:
    """One line for the log: where this rank runs, and what its weights and a default session's window take there."""
    card, ranks = pipeline.card, pipeline.ranks
    weights = sum(parameter.nbytes for parameter in pipeline.dit.parameters())
    window = window_bytes(pipeline.dit.config, card.default_size, card.window_frames, pipeline.dtype) // ranks.world
    free = free_bytes(pipeline.device)
    return (
        f"rank {ranks.rank} of {ranks.world} on {pipeline.device}: DiT {weights / GB:.2f} GB, "
        f"window {card.window_frames} at {card.default_size} {window / GB:.2f} GB, {free / GB:.2f} GB free"
    )


def free_bytes(device: torch.device) -> int:
    """Bytes a session may take: what the driver and torch's pool have free, on a CPU what the system has available."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + pooled
    return available_host_bytes()


def available_host_bytes() -> int:
    """MemAvailable where the kernel tells it, else the free physical pages."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        # Not Linux: the total is the best bound the standard library offers.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
