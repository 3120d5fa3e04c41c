"""A pipeline of a model's real shapes with random weights, drawn where it will run; its speed does not depend on them.

Random and not zero: a device that multiplies zeros draws less power and is clocked higher than in real work.
"""

from __future__ import annotations

import json
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
from lingbot_rt.models.checkpoint import DISTILLED_SHIFT, DISTILLED_STEPS, TRAINED_SIZE, open_checkpoint
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks, SingleRank
from lingbot_rt.shapes import FrameSize

LINGBOT_WORLD_FAST = "lingbot-world-fast"
"""The name that stands for the published 14B: its shapes are known here, no file of it is needed."""

_SEED = 20


@dataclass(frozen=True, slots=True)
class Shapes:
    """All of a model but its weights."""

    dit: DiTConfig
    vae: dict[str, Any]  # of diffusers' AutoencoderKLWan, whose defaults are Wan 2.1
    schedule: FlowSchedule
    default_size: FrameSize


def shapes_of(model: str) -> Shapes:
    """``lingbot-world-fast``, or what ``open_checkpoint`` takes, of which only the configurations are read.

    Raises CheckpointError.
    """
    if model == LINGBOT_WORLD_FAST:
        # Its own window of 45 (sink 3) takes 57 GB; figures are published for the one that clients ask for.
        config = DiTConfig(sink_size=9, sliding_window_num_frames=18)
        return Shapes(config, {}, FlowSchedule(DISTILLED_SHIFT, DISTILLED_STEPS), TRAINED_SIZE)
    folder = open_checkpoint(model)
    return Shapes(
        dit=folder.dit_config,
        vae=json.loads((folder.path / "vae" / "config.json").read_text(encoding="utf-8")),
        schedule=FlowSchedule(folder.shift, folder.denoise_steps),
        default_size=folder.default_size,
    )


def random_pipeline(config: ServeConfig, ranks: Ranks | None = None) -> Pipeline:
    """The pipeline that ``load_pipeline`` makes of ``config``, with other numbers in it and no text encoder.

    Raises CheckpointError for a model that is not there, ConfigError for what the device cannot do.
    """
    shapes = shapes_of(config.model_path)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    require_backend(config.attention_backend, device)
    generator = torch.Generator(device).manual_seed(_SEED)
    with torch.device("meta"):
        empty_dit = CausalDiT(shapes.dit)
    ranks = ranks or SingleRank()
    networks = Networks(
        dit=draw(empty_dit, dtype, device, generator),
        vae=random_vae(config),
        text_encoder=RandomText(shapes.dit, device, generator) if ranks.is_first else None,
    )
    return assemble(config, networks, shapes.schedule, shapes.default_size, ranks)


def random_vae(config: ServeConfig) -> StreamingVAE:
    """The VAE of ``config``'s model alone. Raises as ``random_pipeline`` does."""
    device = resolve_device(config.device)
    with torch.device("meta"):
        empty = AutoencoderKLWan.from_config(shapes_of(config.model_path).vae)
    generator = torch.Generator(device).manual_seed(_SEED)
    return StreamingVAE(draw(empty, DTYPES[config.vae_dtype], device, generator))


def draw(module: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Any:
    """A module of the meta device -> the same on ``device``, each tensor drawn in its own place.

    Weights are normal with variance 1 / fan-in, so that what passes through keeps its size; gains are one, biases zero.
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
    assert not unfilled, f"buffers that nothing filled: {unfilled}"
    return module.requires_grad_(False).eval()


class RandomText:
    """In the text encoder's place: the same random embeddings for every prompt."""

    def __init__(self, config: DiTConfig, device: torch.device, generator: torch.Generator) -> None:
        shape = (1, config.text_len, config.text_dim)
        self._embeddings = torch.randn(shape, generator=generator, device=device)

    def to(self, device: torch.device) -> RandomText:
        self._embeddings = self._embeddings.to(device)
        return self

    def knows(self, prompt: str) -> bool:
        return True

    def encode(self, prompt: str) -> Tensor:
        """[1, L, D]"""
        return self._embeddings
