"""A pipeline with a model's real shapes and random weights, generated on its device. Speed does not depend on weights.

The weights are not zero: a device that multiplies zeros draws less power and clocks higher than in real work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.engine.pipeline import DTYPES, Networks, Pipeline, assemble, resolve_device, resolve_dtype
from lingbot_rt.models.attention import require_backend
from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.model_config import TRAINED_SIZE, read_vae_config
from lingbot_rt.models.schedule import SCHEDULES
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks, SingleRank
from lingbot_rt.shapes import FrameSize

LINGBOT_WORLD_FAST = "lingbot-world-fast"
PUBLISHED = {LINGBOT_WORLD_FAST: "v1", "lingbot-world-v2": "v2"}
"""Names of the published 14B models, each with its schedule. Their shapes are known here, so no file is needed."""

_SEED = 20


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """Everything of a model except its weights."""

    dit: DiTConfig
    vae: dict[str, Any]  # configuration of diffusers' AutoencoderKLWan; its defaults are Wan 2.1
    schedule: FlowSchedule
    default_size: FrameSize


def shapes_of(model: str, schedule: str = "auto") -> ModelShapes:
    """ModelShapes of a model in PUBLISHED, or of anything that ``open_checkpoint`` takes. Reads no weights.

    ``schedule``: as for ``open_checkpoint``. Raises CheckpointError.
    """
    if model in PUBLISHED:
        # The model's own window of 45 (sink 3) takes 57 GB. Published figures use window 18, which clients ask for.
        config = DiTConfig(sink_size=9, sliding_window_num_frames=18)
        shift, steps = SCHEDULES[PUBLISHED[model] if schedule == "auto" else schedule]
        return ModelShapes(config, {}, FlowSchedule(shift, steps), TRAINED_SIZE)
    folder = open_checkpoint(model, schedule)
    return ModelShapes(
        dit=folder.dit_config,
        vae=read_vae_config(folder.path / "vae" / "config.json"),
        schedule=FlowSchedule(folder.schedule.shift, folder.schedule.steps),
        default_size=folder.default_size,
    )


def random_pipeline(config: ServeConfig, ranks: Ranks | None = None) -> Pipeline:
    """The pipeline that ``load_pipeline`` builds, with random weights and a stand-in for the text encoder.

    Raises CheckpointError for a missing model, ConfigError for what the device does not support.
    """
    shapes = shapes_of(config.model_path, config.schedule)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    require_backend(config.attention_backend, device)
    generator = torch.Generator(device).manual_seed(_SEED)
    with torch.device("meta"):
        empty_dit = CausalDiT(shapes.dit)
    ranks = ranks or SingleRank()
    networks = Networks(
        dit=fill_random(empty_dit, dtype, device, generator),
        vae=random_vae(config),
        text_encoder=RandomTextEncoder(shapes.dit, device, generator) if ranks.is_first else None,
    )
    return assemble(config, networks, shapes.schedule, shapes.default_size, ranks)


def random_vae(config: ServeConfig) -> StreamingVAE:
    """Only the VAE of ``config``'s model. Raises what ``random_pipeline`` raises."""
    device = resolve_device(config.device)
    with torch.device("meta"):
        empty = AutoencoderKLWan.from_config(shapes_of(config.model_path).vae)
    generator = torch.Generator(device).manual_seed(_SEED)
    filled = fill_random(empty, torch.float32, device, generator)  # the same weights in every dtype
    return StreamingVAE(nn.Module.to(filled, DTYPES[config.vae_dtype]))


def fill_random(module: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Any:
    """Fills a module of the meta device with random weights on ``device``.

    Weights are normal with variance 1 / fan-in, so activations keep their scale. Gains are one, biases zero.
    """
    nn.Module.to(module, dtype)
    nn.Module.to_empty(module, device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.shape.numel() == parameter.shape[0]:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1:].numel()), generator=generator)
    unfilled = [name for name, _ in module.named_buffers()]
    assert not unfilled, f"uninitialized buffers: {unfilled}"
    return module.requires_grad_(False).eval()


class RandomTextEncoder:
    """Stands in for the text encoder: the same random embeddings for every prompt."""

    def __init__(self, config: DiTConfig, device: torch.device, generator: torch.Generator) -> None:
        shape = (1, config.text_len, config.text_dim)
        self._embeddings = torch.randn(shape, generator=generator, device=device)

    def to(self, device: torch.device) -> RandomTextEncoder:
        self._embeddings = self._embeddings.to(device)
        return self

    def knows(self, prompt: str) -> bool:
        return True

    def encode(self, prompt: str) -> Tensor:
        """[1, L, D]"""
        return self._embeddings
