"""Memory of a session on its device, counted before the session starts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lingbot_rt.engine.dry_run import peak_activations
from lingbot_rt.errors import CapacityError
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.coordinator import AskRoom, Coordinator
from lingbot_rt.session.plan import UNCHANGED, SessionPlan
from lingbot_rt.shapes import FrameSize

if TYPE_CHECKING:
    from lingbot_rt.engine.pipeline import Pipeline

GB = 1e9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one session on its device, without the weights."""

    window_bytes: int  # K/V of the whole window, twice with guidance
    text_bytes: int  # embeddings and K/V of the prompts
    condition_bytes: int  # i2v condition
    opening_bytes: int  # in addition, while the session opens
    chunk_bytes: int  # in addition, inside a chunk: camera modulation, the window's latents, features, activations
    postprocess_bytes: int  # of upscaling and interpolation, which run beside the forward
    vae_bytes: int = 0  # weights of the second VAE, while they are still to be made
    features_bytes: int = 0  # part of chunk_bytes, which leaves the device with the window

    @property
    def beside_window_bytes(self) -> int:
        beside = self.text_bytes + self.condition_bytes + self.postprocess_bytes + self.vae_bytes
        return beside + max(self.opening_bytes, self.chunk_bytes)

    @property
    def total_bytes(self) -> int:
        return self.window_bytes + self.beside_window_bytes


def window_bytes(config: DiTConfig, size: FrameSize, window_frames: int, dtype: torch.dtype) -> int:
    """K and V of every layer for ``window_frames`` latent frames: 1.278 GB per frame for the 14B at 832x480 in bf16."""
    width = config.num_attention_heads * config.attention_head_dim
    return 2 * config.num_layers * width * dtype.itemsize * window_frames * size.tokens_per_frame


def camera_bytes(config: DiTConfig, size: FrameSize, latent_frames: int, dtype: torch.dtype) -> int:
    """Bytes of one chunk's camera modulation: scale and shift of every layer."""
    return 2 * config.num_layers * latent_frames * size.tokens_per_frame * config.dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Setup:
    """What a session's memory depends on beside its own settings."""

    config: DiTConfig
    vae: StreamingVAE  # only its configuration and dtype count: it may be on the meta device
    dtype: torch.dtype
    window_dtype: torch.dtype
    quantization: str = "none"
    ranks: int = 1
    decode_share: float = 1.0  # of a decode, by this rank
    converts_window: bool = False  # the attention kernel needs another format than the window's, a layer at a time


def session_memory(
    setup: Setup, size: FrameSize, latent_frames: int, window_frames: int, branches: int = 1
) -> MemoryPlan:
    """The memory of a rank. Nothing is allocated.

    ``branches``: 2 with guidance. Upscaling and interpolation are not counted.
    """
    config, itemsize = setup.config, setup.dtype.itemsize
    camera = camera_bytes(config, size, latent_frames, setup.dtype) // setup.ranks
    cells = latent_frames * size.latent_height * size.latent_width
    prompt = config.text_len * (2 * config.num_layers * config.dim + config.text_dim) * itemsize
    peak = peak_activations(config, setup.vae, size, latent_frames, setup.dtype, setup.quantization)
    forward = peak.forward // setup.ranks
    decode, features = (int(part * setup.decode_share) for part in (peak.decode, peak.features))
    # A chunk that is computed again for a new prompt sees a copy of a layer, without the newest chunk.
    copied = max(window_frames - latent_frames, 0)
    forward += window_bytes(config, size, copied, setup.window_dtype) // config.num_layers // setup.ranks
    if setup.converts_window:
        forward += window_bytes(config, size, window_frames, setup.dtype) // config.num_layers // setup.ranks
    kept_frames = window_frames + 2 * latent_frames  # some chunks are partly in the sink or in the ring
    latents = kept_frames * size.latent_height * size.latent_width * config.out_channels * torch.float32.itemsize
    return MemoryPlan(
        window_bytes=branches * window_bytes(config, size, window_frames, setup.window_dtype) // setup.ranks,
        text_bytes=branches * prompt,
        condition_bytes=2 * cells * (config.in_channels - config.out_channels) * torch.float32.itemsize,
        opening_bytes=peak.encode,
        chunk_bytes=camera + latents + max(features + forward, decode),
        postprocess_bytes=0,
        features_bytes=features,
    )


def plan_memory(pipeline: Pipeline, plan: SessionPlan) -> MemoryPlan:
    """``session_memory`` of a session of ``pipeline``, with its upscaling and interpolation.

    Loads the networks of these. Raises InvalidInit when they do not load.
    """
    half = pipeline.half_vae_of(plan)
    setup = Setup(
        config=pipeline.dit.config,
        vae=pipeline.vae if half is None else half.for_plans,
        dtype=pipeline.dtype,
        window_dtype=pipeline.kv_cache_dtype,
        quantization=pipeline.model_info.quantization,
        ranks=pipeline.ranks.world,
        decode_share=pipeline.decode.share(plan.size.latent_width),
        converts_window=pipeline.kv_cache_dtype != pipeline.dtype and pipeline.model_info.attention_backend != "fa3",
    )
    branches = 2 if plan.guidance_scale > 1 else 1
    planned = session_memory(setup, plan.size, plan.latent_frames, plan.window_frames, branches)
    tokens = plan.latent_frames * plan.size.tokens_per_frame
    qkv_bytes = setup.config.dim * (setup.dtype.itemsize + 2 * setup.window_dtype.itemsize)
    exchanged = pipeline.dit.window_attention.missing_bytes(tokens, qkv_bytes)
    return replace(
        planned,
        chunk_bytes=planned.chunk_bytes + exchanged,
        postprocess_bytes=pipeline.open_postprocessor(plan).memory_bytes(),
        vae_bytes=0 if half is None else half.missing_bytes,
    )


class Room(NamedTuple):
    """What a session takes on one rank, and what is free there. Bytes."""

    window: int
    beside: int
    free: int

    @property
    def needed(self) -> int:
        return self.window + self.beside

    def largest_window(self, window_frames: int) -> int:
        """Latent frames that would fit, of a session of ``window_frames``."""
        return (self.free - self.beside) // (self.window // window_frames)


def share_room(pipeline: Pipeline, plan: SessionPlan, needed: MemoryPlan | None = None) -> list[Room]:
    """The session's Room on each rank. Every rank must call it. ``needed``: this rank's plan_memory, if known."""
    needed = needed or plan_memory(pipeline, plan)
    captured, free = pipeline.dit.captured, _own_free_bytes(pipeline)
    if captured is not None and free < needed.total_bytes <= free + captured.nbytes:
        captured.clear()  # they only took what was left
        free = _own_free_bytes(pipeline)
    own = Room(needed.window_bytes, needed.beside_window_bytes, free)
    return [Room(*numbers) for numbers in pipeline.ranks.share(own)]


def require_room(
    pipeline: Pipeline,
    plan: SessionPlan,
    coordinator: Coordinator | None = None,
    make_room: Callable[[MemoryPlan, Callable[[], bool]], None] | None = None,
) -> MemoryPlan:
    """The session's memory on this rank. Raises CapacityError when any rank has too little.

    The error has the window that would fit. ``coordinator`` tells the other ranks to share; without it they must call
    this too. ``make_room`` is called before, with the memory and a function that says whether it is there.
    """
    needed = plan_memory(pipeline, plan)
    if make_room is not None:
        make_room(needed, lambda: _is_enough(_ask(pipeline, plan, needed, coordinator)))
    rooms = _ask(pipeline, plan, needed, coordinator)
    fitting = [room.largest_window(plan.window_frames) for room in rooms]
    rank = fitting.index(min(fitting))
    room = rooms[rank]
    if room.needed <= room.free:
        return needed
    smallest = plan.sink_frames + plan.latent_frames
    fix = f"use window <= {fitting[rank]}" if fitting[rank] >= smallest else "use a smaller size"
    if needed.postprocess_bytes and rank == 0:
        fix += f", or do without upscaling and interpolation ({needed.postprocess_bytes / GB:.1f} GB)"
    where, there = (f" on rank {rank}", " there") if len(rooms) > 1 else ("", "")
    raise CapacityError(
        f"window {plan.window_frames} at {plan.size} needs {room.needed / GB:.1f} GB{where}, "
        f"{room.free / GB:.1f} GB is free{there}: {fix}",
        field="realtime_causal_kv_cache_num_frames",
    )


def require_host_room(plan: SessionPlan, needed: MemoryPlan, missing_bytes: int, ranks: int) -> None:
    """Raises CapacityError if the session cannot take turns with others that the device has no room beside.

    ``missing_bytes``: host memory of a rank that these still have to take before they can leave the device. All ranks
    count as one machine.
    """
    total = (missing_bytes + needed.window_bytes + needed.features_bytes) * ranks
    free = available_host_bytes()
    if total > free:
        raise CapacityError(
            f"window {plan.window_frames} at {plan.size} fits only in turns with the other sessions, which takes "
            f"{total / GB:.1f} GB of host memory, {free / GB:.1f} GB is free: use a smaller size or window, or come "
            "back when a session has ended",
            field="realtime_causal_kv_cache_num_frames",
        )


def fits(pipeline: Pipeline, plan: SessionPlan, coordinator: Coordinator | None = None) -> bool:
    """Whether every rank has room for the session. ``coordinator``: see ``require_room``."""
    return _is_enough(_ask(pipeline, plan, plan_memory(pipeline, plan), coordinator))


def _is_enough(rooms: list[Room]) -> bool:
    return all(room.needed <= room.free for room in rooms)


def _ask(pipeline: Pipeline, plan: SessionPlan, needed: MemoryPlan, coordinator: Coordinator | None) -> list[Room]:
    if coordinator is None:
        return share_room(pipeline, plan, needed)
    # Only rank 0 has frames to upscale or interpolate. Nobody needs the picture to count.
    with coordinator.command(AskRoom(replace(plan, first_frame=plan.first_frame[:0], postprocess=UNCHANGED))):
        return share_room(pipeline, plan, needed)


def _own_free_bytes(pipeline: Pipeline) -> int:
    """Free bytes for this rank. On a CPU all ranks share the same memory."""
    free = free_bytes(pipeline.device)
    if pipeline.device.type == "cpu":
        return free // pipeline.ranks.world
    captured = pipeline.dit.captured
    return free if captured is None else max(0, free - captured.nbytes)


def describe_share(pipeline: Pipeline) -> str:
    """One line for the log: this rank's device, and the memory of its weights and of a default session's window."""
    info, ranks = pipeline.model_info, pipeline.ranks
    weights = weight_bytes(pipeline.dit)
    window = window_bytes(pipeline.dit.config, info.default_size, info.window_frames, pipeline.kv_cache_dtype)
    free = free_bytes(pipeline.device)
    window_gb = window / ranks.world / GB
    return (
        f"rank {ranks.rank} of {ranks.world} on {pipeline.device}: DiT {weights / GB:.2f} GB, "
        f"window {info.window_frames} at {info.default_size} {window_gb:.2f} GB, {free / GB:.2f} GB free"
    )


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers. Shared ones count once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in module.state_dict().values()}
    return sum(storage.nbytes() for storage in storages.values())


def free_bytes(device: torch.device) -> int:
    """Bytes free for a session: on a GPU those of driver and torch's pool, on a CPU the available host memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + pooled
    return available_host_bytes()


def available_host_bytes() -> int:
    """``known_host_bytes``, else the free or, without Linux's /proc, all physical pages."""
    known = known_host_bytes()
    if known is not None:
        return known
    pages = "SC_AVPHYS_PAGES" if os.path.exists("/proc/meminfo") else "SC_PHYS_PAGES"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def known_host_bytes() -> int | None:
    """Host memory that programs can still take: Linux's MemAvailable, or less in a container with a limit.

    None where the system does not say.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    return min([found[0], *_container_bytes()]) if found else None


def _container_bytes(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What is left of a container's limit, by either version of control groups. Files in memory can be dropped."""
    for folder, limit, used, prefix in (
        (root, "memory.max", "memory.current", ""),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            # A group without a limit says "max", which is no number.
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield left + sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        except (OSError, ValueError):
            continue


def release_unused(device: torch.device) -> None:
    """Gives memory that closed sessions have left back to the device, so that the process does not grow."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The C library's function that returns free memory to the system; None where it has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
