"""Loads the networks of a model and sets them up on their device."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.compilation import resolve_compile, set_compile_cache
from lingbot_rt.engine.decoding import Decoding, HalfVAE
from lingbot_rt.engine.device import describe_device, resolve_device, resolve_dtype, resolve_kv_cache_dtype
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.engine.memory import release_unused
from lingbot_rt.engine.model_memory import require_memory
from lingbot_rt.engine.placement import Placement, StreamedBlocks
from lingbot_rt.errors import CheckpointError, InvalidInit
from lingbot_rt.models.attention import missing_package, require_backend, resolve_backend
from lingbot_rt.models.checkpoint import CheckpointFolder, load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.dit import Block, CausalDiT, TextKV
from lingbot_rt.models.file_checks import listed
from lingbot_rt.models.quantize import FP8, require_fp8, takes_fp8
from lingbot_rt.models.text_encoder import PromptEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks, SingleRank
from lingbot_rt.parallel.parallelize import (
    FrameDecoder,
    WidthDecoder,
    parallelize_decoder,
    parallelize_dit,
    parallelize_text_encoder,
)
from lingbot_rt.postprocess.stage import PostprocessNetworks, PostProcessor
from lingbot_rt.session.plan import EngineStatus, ModelInfo, SessionPlan

log = logging.getLogger(__name__)


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
    identity: Mapping[str, Any]  # what a snapshot says of its model
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
    postprocess: PostprocessNetworks
    half_vae: HalfVAE | None = None  # None: the VAE is in bfloat16 itself
    history_bytes: int = 0  # per session, for chunks that it can go back to; 0: only what its window is computed from
    keeps_kv: bool = False  # histories hold K/V and VAE features too
    ranks: Ranks = field(default_factory=SingleRank)

    @property
    def own_heads(self) -> int:
        """Attention heads of this rank, whose K/V are in its window."""
        return self.dit.config.num_attention_heads // self.ranks.world

    def half_vae_of(self, plan: SessionPlan) -> HalfVAE | None:
        """The second VAE, if the session takes it."""
        return self.half_vae if plan.bfloat16_vae else None

    def decoding(self, plan: SessionPlan) -> Decoding:
        """The VAE of a session. The second one is made when it is first asked for."""
        half = self.half_vae_of(plan)
        return Decoding(self.vae, self.vae_placement, self.decode) if half is None else half.get()

    def open_postprocessor(self, plan: SessionPlan) -> PostProcessor:
        """The session's upscaling and interpolation. Raises InvalidInit when their networks do not load."""
        try:
            return self.postprocess.open(plan.postprocess, plan.size)
        except CheckpointError as error:
            raise InvalidInit(str(error), field=error.field) from None

    def text_kv(self, prompt: str) -> TextKV:
        """Cross-attention K/V of ``prompt`` for every block of the DiT."""
        return self.dit.text_kv(self.text_encoder.encode(prompt).to(self.device, self.dtype))


def load_pipeline(
    config: ServeConfig,
    report: Callable[[EngineStatus], None],
    ranks: Ranks | None = None,
    prompts: PromptEncoder | None = None,
) -> Pipeline:
    """Loads the model of ``config`` and sets it up: quantization, offload, several ranks and compilation.

    ``report`` gets the progress. ``ranks``: None for a single process. ``prompts`` takes the place of the model's text
    encoder, which is then not loaded. Raises CheckpointError when the model's folder is incomplete, ConfigError when
    the device is missing, too small for the weights, or cannot do what ``config`` asks.
    """
    device = resolve_device(config.device)
    dtype, vae_dtype = resolve_dtype(config.dtype, device), resolve_dtype(config.vae_dtype, device)
    require_backend(config.attention_backend, device, dtype)
    if config.quantization == "fp8":
        require_fp8(device, dtype)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    elif config.num_gpus > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.num_gpus))

    ranks = ranks or SingleRank()
    folder = open_checkpoint(config.model_path, config.schedule, config.load_format)
    if ranks.is_first:
        if folder.left_out:
            log.warning("%s: not loaded: %s", folder.path, listed(folder.left_out))
        if folder.is_dummy:
            log.info("%s: random weights: the frames are noise", config.model_path)
        log.log(logging.WARNING if folder.schedule.assumed else logging.INFO, "%s", folder.schedule)
    if ranks.world == 1:
        require_memory(config, folder, text_encoder=prompts is None)

    def part(name: str) -> Callable[[float], None]:
        return lambda done: report(EngineStatus("loading weights", done, name))

    def place(offload: bool) -> torch.device:
        return torch.device("cpu") if offload else device

    dit = load_dit(folder, dtype, place(config.dit_cpu_offload), part("transformer"), config.quantization)
    if config.dit_cpu_offload and device.type != "cpu":
        blocks = StreamedBlocks(dit.blocks, device)
        dit.blocks = cast("Sequence[Block]", blocks)
        log.info("DiT offloaded: each forward copies %.1f GB to the device", blocks.bytes_per_forward / 1e9)
    dit.to(device)
    vae = load_vae(folder, vae_dtype, place(config.vae_cpu_offload), part("vae"))
    if ranks.is_first and prompts is None:
        text_encoder = load_text_encoder(folder, dtype, place(config.text_encoder_cpu_offload), part("text encoder"))
        if config.text_encoder_cpu_offload and device.type != "cpu":
            text_encoder.offload(device, lambda layers: StreamedBlocks(layers, device))
        prompts = text_encoder
    release_unused(device)
    return _assembled(config, folder, Networks(dit, vae, prompts if ranks.is_first else None), ranks)


def _assembled(config: ServeConfig, folder: CheckpointFolder, networks: Networks, ranks: Ranks) -> Pipeline:
    """Loaded networks in their places -> a pipeline, with several ranks and compilation as ``config`` says."""
    dit, vae = networks.dit, networks.vae
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, dtype)
    compiled = resolve_compile(config.compile, device)
    dit.attention_backend = config.attention_backend
    parallelize_dit(dit, ranks, device, config.peer_memory)
    text_shape = (1, dit.config.text_len, dit.config.text_dim)
    text_encoder = parallelize_text_encoder(networks.text_encoder, ranks, text_shape, dtype, device)
    decode = parallelize_decoder(vae, ranks, config.vae_parallel)
    if compiled:
        set_compile_cache(config.compile_cache)
        compile_networks(dit, vae, device, kv_cache_dtype)
    # Weights that come and go with every forward have no fixed place.
    if dit.fused_ops is not None and config.cuda_graphs == "auto" and not config.dit_cpu_offload:
        dit.capture_forwards(device)

    def set_up(other: StreamingVAE) -> Decoding:
        other_decode = parallelize_decoder(other, ranks, config.vae_parallel)
        if compiled:
            other.compile()
        return Decoding(other, Placement(other, device, offload=config.vae_cpu_offload), other_decode)

    schedule = FlowSchedule(folder.schedule.shift, folder.schedule.steps)
    info = ModelInfo(
        model_id=config.model_id,
        model_path=config.model_path,
        default_size=folder.default_size,
        latent_frames=dit.config.latent_frames,
        sink_frames=dit.config.sink_frames,
        window_frames=dit.config.window_frames,
        num_steps=len(schedule.steps),
        device=describe_device(device),
        dtype=_name(dtype),
        num_ranks=config.num_gpus,
        vae_parallel="width" if isinstance(decode, WidthDecoder) else "none",
        attention_backend=resolve_backend(config.attention_backend, device, dtype),
        kv_cache_dtype=_name(kv_cache_dtype),
        quantization=config.quantization,
        vae_dtype=_name(vae.dtype),
        compiled=compiled,
        load_format=config.load_format,
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
        hint = missing_package(info.attention_backend, device)
        if hint and config.attention_backend == "auto":
            log.info("%s", hint)
    return Pipeline(
        model_info=info,
        identity=_identity(dit, vae),
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
        postprocess=PostprocessNetworks(device),
        half_vae=None if vae.dtype == torch.bfloat16 else HalfVAE(vae, set_up),
        history_bytes=config.history_mb * 2**20,
        keeps_kv=config.snapshot_kv,
        ranks=ranks,
    )


def _identity(dit: CausalDiT, vae: StreamingVAE) -> dict[str, Any]:
    """The DiT's configuration, and a digest of some weights of both networks.

    In bfloat16, so that it does not depend on the number format in which they are loaded.
    """
    digest = hashlib.sha256()
    for weight in (dit.head.head.weight, dit.patch_embedding.weight, *vae.identifying_weights):
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return asdict(dit.config) | {"weights": digest.hexdigest()[:16]}


def compile_networks(dit: CausalDiT, vae: StreamingVAE, device: torch.device, kv_cache_dtype: torch.dtype) -> None:
    """Compiles what is compiled at the first use of a frame size; on a GPU the DiT has Triton kernels for all sizes.

    Older GPUs, whose kernels cannot write a window in fp8, compile the DiT too.
    """
    writes_window = kv_cache_dtype != FP8 or takes_fp8(device)
    if device.type == "cuda" and writes_window:
        dit.fuse_blocks()
    else:
        dit.compile_blocks()
    vae.compile()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
