"""The loaded networks, where they run, and what they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.compilation import keep_compiled_code, resolve_compile
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.engine.placement import Placement, StreamedBlocks
from lingbot_rt.errors import CheckpointError, ConfigError, InvalidInit
from lingbot_rt.models.attention import require_backend, resolve_backend
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.dit import Block, CausalDiT, TextKV
from lingbot_rt.models.quantize import quantize_linears, require_fp8
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks
from lingbot_rt.parallel.share import Decode, share_decode, share_dit, share_text
from lingbot_rt.postprocess.stage import PostprocessNetworks, PostProcessor
from lingbot_rt.session.plan import EngineStatus, ModelInfo, SessionPlan
from lingbot_rt.shapes import FrameSize

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Networks:
    """A model's three, with their weights."""

    dit: CausalDiT
    vae: StreamingVAE
    text_encoder: TextEncoder | None  # None where another rank has it


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One causal-DMD pipeline on one device."""

    model_info: ModelInfo
    schedule: FlowSchedule
    device: torch.device
    dtype: torch.dtype
    noise_device: torch.device
    dit: CausalDiT
    vae: StreamingVAE
    vae_placement: Placement
    decode: Decode
    text_encoder: TextEncoder
    text_encoder_placement: Placement
    postprocess: PostprocessNetworks
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def own_heads(self) -> int:
        """Heads of self-attention whose window this process keeps."""
        return self.dit.config.num_attention_heads // self.ranks.world

    def open_postprocessor(self, plan: SessionPlan) -> PostProcessor:
        """What the session's frames go through after decode. Raises InvalidInit when its model does not load."""
        try:
            return self.postprocess.open(plan.postprocess, plan.size)
        except CheckpointError as error:
            raise InvalidInit(str(error), field=error.field) from None

    def text_kv(self, prompt: str) -> TextKV:
        """A prompt's cross-attention K/V for every block of the DiT."""
        # An encoder that rests on the CPU stays there for words that it knows: a visit moves 11 GB of the 14B's.
        with nullcontext() if self.text_encoder.knows(prompt) else self.text_encoder_placement.at_work():
            text_BLD = self.text_encoder.encode(prompt)
        return self.dit.text_kv(text_BLD.to(self.device, self.dtype))


def load_pipeline(config: ServeConfig, report: Callable[[EngineStatus], None], ranks: Ranks | None = None) -> Pipeline:
    """Loads the model that ``config`` names, telling ``report`` how far it is; ``ranks`` share its sessions.

    Raises CheckpointError when the folder is incomplete, ConfigError when the device is not there.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    require_backend(config.attention_backend, device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    elif config.num_gpus > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.num_gpus))

    folder = open_checkpoint(config.model_path)

    def part(name: str) -> Callable[[float], None]:
        return lambda done: report(EngineStatus("loading weights", done, name))

    rest = torch.device("cpu")
    dit = load_dit(folder, dtype, rest if config.dit_cpu_offload else device, part("transformer"))
    vae = load_vae(folder, DTYPES[config.vae_dtype], rest if config.vae_cpu_offload else device, part("vae"))
    ranks = ranks or Ranks()
    text_encoder = None
    if ranks.is_first:
        text_encoder = load_text_encoder(
            folder, dtype, rest if config.text_encoder_cpu_offload else device, part("text encoder")
        )
    schedule = FlowSchedule(folder.shift, folder.denoise_steps)
    return assemble(config, Networks(dit, vae, text_encoder), schedule, folder.default_size, ranks)


def assemble(
    config: ServeConfig, networks: Networks, schedule: FlowSchedule, default_size: FrameSize, ranks: Ranks
) -> Pipeline:
    """Networks as loaded -> a pipeline that runs them as ``config`` says: quantized, offloaded, shared, compiled.

    Raises ConfigError for what the device cannot do.
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
        log.info("DiT offloaded: %.1f GB cross the bus in each forward", blocks.bytes_a_pass / 1e9)
    dit.to(device)
    dit.attention_backend = config.attention_backend
    share_dit(dit, ranks)
    text_shape = (1, dit.config.text_len, dit.config.text_dim)
    text_encoder = share_text(networks.text_encoder, ranks, text_shape, dtype, device)
    decode = share_decode(vae, ranks, config.vae_parallel)
    if compiled:
        keep_compiled_code(config.compile_cache)
        dit.compile_blocks()
        vae.compile()
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
        quantization=config.quantization,
        vae_dtype=_name(vae.dtype),
        compiled=compiled,
    )
    if ranks.is_first:
        log.info(
            "self-attention %s, linears %s, VAE %s, %s",
            info.attention_backend,
            info.dtype if info.quantization == "none" else info.quantization,
            info.vae_dtype,
            "compiled" if compiled else "not compiled",
        )
    return Pipeline(
        model_info=info,
        schedule=schedule,
        device=device,
        dtype=dtype,
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


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one, else cpu. Raises ConfigError for a cuda that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu", field="device")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on an accelerator and float32 on a CPU."""
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
