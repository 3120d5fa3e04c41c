"""The loaded networks, where they run, and what they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_plan import EngineStatus, ModelCard, SessionPlan
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.engine.placement import Placement
from lingbot_rt.errors import CheckpointError, ConfigError, InvalidInit
from lingbot_rt.models.attention import require_backend
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.dit import CausalDiT, TextKV
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks
from lingbot_rt.parallel.share import Decode, share_decode, share_dit, share_text
from lingbot_rt.postprocess.stage import PostprocessNetworks, PostProcessor

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One causal-DMD pipeline on one device. The VAE runs in float32, as the reference's does."""

    card: ModelCard
    schedule: FlowSchedule
    device: torch.device
    dtype: torch.dtype
    noise_device: torch.device
    dit: CausalDiT
    dit_placement: Placement
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
        with self.text_encoder_placement.at_work():
            text_BLD = self.text_encoder.encode(prompt)
        with self.dit_placement.at_work():
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
    dit.attention_backend = config.attention_backend
    ranks = ranks or Ranks()
    share_dit(dit, ranks)
    vae = load_vae(folder, torch.float32, rest if config.vae_cpu_offload else device, part("vae"))
    dit_config = dit.config
    own_text = None
    if ranks.is_first:
        own_text = load_text_encoder(
            folder, dtype, rest if config.text_encoder_cpu_offload else device, part("text encoder")
        )
    text_encoder = share_text(own_text, ranks, (1, dit_config.text_len, dit_config.text_dim), dtype, device)
    card = ModelCard(
        model_id=config.model_id,
        model_path=config.model_path,
        default_size=folder.default_size,
        latent_frames=dit_config.latent_frames,
        sink_frames=dit_config.sink_frames,
        window_frames=dit_config.window_frames,
        num_steps=len(folder.denoise_steps),
        device=describe_device(device),
        dtype=str(dtype).removeprefix("torch."),
        num_ranks=config.num_gpus,
    )
    return Pipeline(
        card=card,
        schedule=FlowSchedule(folder.shift, folder.denoise_steps),
        device=device,
        dtype=dtype,
        noise_device=torch.device("cpu") if config.deterministic_noise == "cpu" else device,
        dit=dit,
        dit_placement=Placement(dit, device, offload=config.dit_cpu_offload),
        vae=vae,
        vae_placement=Placement(vae, device, offload=config.vae_cpu_offload),
        decode=share_decode(vae, ranks, config.vae_parallel),
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
    return _DTYPES[name]


def describe_device(device: torch.device) -> str:
    """``cuda: NVIDIA H100 80GB HBM3`` or ``cpu: 2 threads``."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {torch.get_num_threads()} threads"
