"""A pipeline with random weights for measurements: speed does not depend on weights.

The text encoder, which is not measured, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.device import resolve_device, resolve_dtype
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.models.checkpoint import CheckpointFolder, load_vae, open_checkpoint
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.model_path import DUMMY
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import Ranks
from lingbot_rt.session.plan import EngineStatus


def random_model(config: ServeConfig) -> CheckpointFolder:
    """The configurations of ``config``'s model, with random weights. Reads no weights. Raises CheckpointError."""
    return open_checkpoint(config.model_path, config.schedule, DUMMY)


def random_pipeline(
    config: ServeConfig, report: Callable[[EngineStatus], None] = lambda status: None, ranks: Ranks | None = None
) -> Pipeline:
    """The pipeline of ``config`` with random weights and without a text encoder. Raises what ``load_pipeline`` does."""
    prompts = FixedEmbeddings(random_model(config).dit_config, resolve_device(config.device))
    return load_pipeline(replace(config, load_format=DUMMY), report, ranks, prompts)


def random_vae(config: ServeConfig) -> StreamingVAE:
    """Only the VAE of ``config``'s model. Raises what ``random_pipeline`` raises."""
    device = resolve_device(config.device)
    return load_vae(random_model(config), resolve_dtype(config.vae_dtype, device), device)


class FixedEmbeddings:
    """Stands in for the text encoder: the same random embeddings for every prompt."""

    def __init__(self, config: DiTConfig, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, config.text_len, config.text_dim)
        self._embeddings = torch.randn(shape, generator=generator, device=device)

    def encode(self, prompt: str) -> Tensor:
        """[1, L, D]"""
        return self._embeddings
