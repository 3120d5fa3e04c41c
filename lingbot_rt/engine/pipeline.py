"""Loads the networks of a model and sets them up on their device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.compilation import resolve_compile, set_compile_cache
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.engine.placement import Placement, StreamedBlocks
from lingbot_rt.errors import CheckpointError, ConfigError, InvalidInit
from lingbot_rt.models.attention import require_backend, resolve_backend
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.dit import Block, CausalDiT, TextKV
from lingbot_rt.models.file_checks import listed
from lingbot_rt.models.quantize import FP8, quantize_linears, require_fp8
from lingbot_rt.models.text_encoder import PromptEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks, SingleRank
from lingbot_rt.parallel.parallelize import (
    FrameDecoder,
    parallelize_decoder,
    parallelize_dit,
    parallelize_text_encoder,
)
from lingbot_rt.postprocess.stage import PostprocessNetworks, PostProcessor
from lingbot_rt.session.plan import EngineStatus, ModelInfo, SessionPlan
from lingbot_rt.shapes import FrameSize

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KV_CACHE_DTYPES = {"bfloat16": torch.bfloat16, "fp8": FP8}


@dataclass(frozen=True, slots=True)
class Networks:
    """The three networks of a model with their weights."""

    dit: CausalDiT
    vae: StreamingVAE
    text_encoder: PromptEncoder | None  # on rank 0 only


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The networks on their device, and how they run there."""

    model_info: ModelInfo
    schedule: FlowSchedule
    device: torch.device
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    noise_device: torch.device
    dit: CausalDiT
    vae: StreamingVAE
    vae_placement: Placement
    decode: FrameDecoder
    text_encoder: PromptEncoder
    text_encoder_placement: Placement
    postprocess: PostprocessNetworks
    ranks: Ranks = field(default_factory=SingleRank)

    @property
    def own_heads(self) -> int:
        """Attention heads of this rank, whose K/V are in its window."""
        return self.dit.config.num_attention_heads // self.ranks.world

    def open_postprocessor(self, plan: SessionPlan) -> PostProcessor:
        """The session's upscaling and interpolation. Raises InvalidInit when their networks do not load."""
        try:
            return self.postprocess.open(plan.postprocess, plan.size)
        except CheckpointError as error:
            raise InvalidInit(str(error), field=error.field) from None

    def text_kv(self, prompt: str) -> TextKV:
        """Cross-attention K/V of ``prompt`` for every block of the DiT."""
        # An offloaded encoder is not moved for a prompt that it knows: the 14B's encoder is 11 GB.
        with nullcontext() if self.text_encoder.knows(prompt) else self.text_encoder_placement.on_device():
            text_BLD = self.text_encoder.encode(prompt)
        return self.dit.text_kv(text_BLD.to(self.device, self.dtype))


def load_pipeline(config: ServeConfig, report: Callable[[EngineStatus], None], ranks: Ranks | None = None) -> Pipeline:
    """Loads the model of ``config``. ``report`` gets the progress. ``ranks``: None for a single process.

    Raises CheckpointError when the model's folder is incomplete, ConfigError when the device is missing or cannot do
    what ``config`` asks.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    require_backend(config.attention_backend, device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    elif config.num_gpus > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.num_gpus))

    folder = open_checkpoint(config.model_path, config.schedule)
    if ranks is None or ranks.is_first:
        if folder.left_out:
            log.warning("%s: not loaded: %s", folder.path, listed(folder.left_out))
        log.log(logging.WARNING if folder.schedule.assumed else logging.INFO, "%s", folder.schedule)

    def part(name: str) -> Callable[[float], None]:
        return lambda done: report(EngineStatus("loading weights", done, name))

    host = torch.device("cpu")
    dit = load_dit(folder, dtype, host if config.dit_cpu_offload else device, part("transformer"))
    vae = load_vae(folder, DTYPES[config.vae_dtype], host if config.vae_cpu_offload else device, part("vae"))
    ranks = ranks or SingleRank()
    text_encoder = None
    if ranks.is_first:
        text_encoder = load_text_encoder(
            folder, dtype, host if config.text_encoder_cpu_offload else device, part("text encoder")
        )
    schedule = FlowSchedule(folder.schedule.shift, folder.schedule.steps)
    return assemble(config, Networks(dit, vae, text_encoder), schedule, folder.default_size, ranks)


def assemble(
    config: ServeConfig, networks: Networks, schedule: FlowSchedule, default_size: FrameSize, ranks: Ranks
) -> Pipeline:
    """Loaded networks -> a pipeline, with quantization, offload, several ranks and compilation as ``config`` says.

    Raises ConfigError when the device cannot do it.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    compiled = resolve_compile(config.compile, device)
    dit, vae = networks.dit, networks.vae
    if config.quantization == "fp8":
        require_fp8(device, dtype)
        for block in dit.blocks:
            quantize_linears(block)
    if config.dit_cpu_offload and device.type != "cpu":
        blocks = StreamedBlocks(dit.blocks, device)
        dit.blocks = cast("Sequence[Block]", blocks)
        log.info("DiT offloaded: each forward copies %.1f GB to the device", blocks.bytes_per_forward / 1e9)
    dit.to(device)
    dit.attention_backend = config.attention_backend
    parallelize_dit(dit, ranks)
    text_shape = (1, dit.config.text_len, dit.config.text_dim)
    text_encoder = parallelize_text_encoder(networks.text_encoder, ranks, text_shape, dtype, device)
    decode = parallelize_decoder(vae, ranks, config.vae_parallel)
    if compiled:
        set_compile_cache(config.compile_cache)
        compile_networks(dit, vae, device)
    kv_cache_dtype = KV_CACHE_DTYPES.get(config.kv_cache_dtype, dtype)
    info = ModelInfo(
        model_id=config.model_id,
        model_path=config.model_path,
        default_size=default_size,
        latent_frames=dit.config.latent_frames,
        sink_frames=dit.config.sink_frames,
        window_frames=dit.config.window_frames,
        num_steps=len(schedule.steps),
        device=describe_device(device),
        dtype=_name(dtype),
        num_ranks=config.num_gpus,
        attention_backend=resolve_backend(config.attention_backend, device, dtype),
        kv_cache_dtype=_name(kv_cache_dtype),
        quantization=config.quantization,
        vae_dtype=_name(vae.dtype),
        compiled=compiled,
    )
    if ranks.is_first:
        log.info(
            "attention %s, window %s, linears %s, VAE %s, %s",
            info.attention_backend,
            info.kv_cache_dtype,
            info.dtype if info.quantization == "none" else info.quantization,
            info.vae_dtype,
            "compiled" if compiled else "not compiled",
        )
    return Pipeline(
        model_info=info,
        schedule=schedule,
        device=device,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        noise_device=torch.device("cpu") if config.deterministic_noise == "cpu" else device,
        dit=dit,
        vae=vae,
        vae_placement=Placement(vae, device, offload=config.vae_cpu_offload),
        decode=decode,
        text_encoder=text_encoder,
        text_encoder_placement=Placement(text_encoder, device, offload=config.text_encoder_cpu_offload),
        postprocess=PostprocessNetworks(device),
        ranks=ranks,
    )


def compile_networks(dit: CausalDiT, vae: StreamingVAE, device: torch.device) -> None:
    """Compiles what is compiled at the first use of a frame size; on a GPU the DiT has Triton kernels for all sizes."""
    if device.type == "cuda":
        dit.fuse_blocks()
    else:
        dit.compile_blocks()
    vae.compile()


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda when there is a CUDA device, else cpu. Raises ConfigError for ``cuda`` without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu", field="device")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_device(device: torch.device) -> str:
    """``cuda: NVIDIA H100 80GB HBM3`` or ``cpu: 2 threads``."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {torch.get_num_threads()} threads"
