"""Memory of a model's weights, known from its configuration: what does not fit is refused before any of it is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lingbot_rt.config import ServeConfig
from lingbot_rt.config_values import environment_value, flag
from lingbot_rt.engine.device import resolve_device, resolve_dtype
from lingbot_rt.engine.memory import GB, free_bytes, known_host_bytes, window_bytes
from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import (
    CheckpointFolder,
    empty_dit,
    empty_text_encoder,
    empty_vae,
    open_checkpoint,
)
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.quantize import require_fp8
from lingbot_rt.session.settings import MIN_SIDE
from lingbot_rt.shapes import FrameSize

_RESIDENT = 2
"""Blocks of an offloaded network that are on the device."""

_FP8_MULTIPLE = 16

REMEDIES = ("text_encoder_cpu_offload", "dtype", "quantization", "num_gpus", "dit_cpu_offload")
"""Options that make the weights smaller in one place. Each costs more speed or exactness than those before it."""


@dataclass(frozen=True, slots=True)
class LayeredBytes:
    """Bytes of a network whose equal layers may be offloaded."""

    layers: int  # how many
    layer: int  # of each
    outside: int  # of everything else

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.outside

    @property
    def streamed(self) -> int:
        """On the device while the layers are on the host."""
        return min(_RESIDENT, self.layers) * self.layer + self.outside

    @property
    def pinned(self) -> int:
        """Host memory of offloaded layers. torch takes pinned memory in powers of two."""
        return self.layers * (1 << (self.layer - 1).bit_length())


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes of one copy of each network of a model."""

    dit: LayeredBytes
    vae: int
    text_encoder: LayeredBytes


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of a module."""

    parameters: int
    linear_weights: int = 0  # those of them that are weights of linears
    linear_rows: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> Count:
        linears = [each.weight for each in module.modules() if type(each) is nn.Linear]
        return cls(
            sum(value.numel() for value in module.parameters()),
            sum(weight.numel() for weight in linears),
            sum(weight.shape[0] for weight in linears),
        )

    def nbytes(self, dtype: torch.dtype, *, fp8: bool = False) -> int:
        """With ``fp8`` linears have a byte per weight and a float32 scale per row."""
        if not fp8:
            return self.parameters * dtype.itemsize
        rest = self.parameters - self.linear_weights
        return self.linear_weights + self.linear_rows * torch.float32.itemsize + rest * dtype.itemsize


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """Parameters of a model's networks."""

    layers: int
    layer: Count
    outside: int
    vae: int
    text_layers: int
    text_layer: int
    text_outside: int

    @classmethod
    def of(cls, folder: CheckpointFolder) -> ModelCounts:
        """Counted on the meta device: nothing is allocated. Raises CheckpointError for what cannot be built."""
        dit = empty_dit(replace(folder, dit_config=replace(folder.dit_config, num_layers=1)))
        layer = Count.of(dit.blocks[0])
        text = empty_text_encoder(folder)
        stack = text.encoder
        return cls(
            layers=folder.dit_config.num_layers,
            layer=layer,
            outside=Count.of(dit).parameters - layer.parameters,
            vae=Count.of(empty_vae(folder)).parameters,
            text_layers=len(stack.block),
            text_layer=Count.of(stack.block[0]).parameters,
            # The table of embeddings has two names.
            text_outside=Count.of(text.shared).parameters + Count.of(stack.final_layer_norm).parameters,
        )

    def nbytes(self, dtype: torch.dtype, vae_dtype: torch.dtype, quantization: str = "none") -> ModelBytes:
        layer = self.layer.nbytes(dtype, fp8=quantization == "fp8")
        return ModelBytes(
            dit=LayeredBytes(self.layers, layer, self.outside * dtype.itemsize),
            vae=self.vae * vae_dtype.itemsize,
            text_encoder=LayeredBytes(
                self.text_layers, self.text_layer * dtype.itemsize, self.text_outside * dtype.itemsize
            ),
        )


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of the weights and of the smallest session: on the first rank's device, and on the host for all ranks."""

    device: int
    host: int
    parts: str  # the networks, for a message


def needed_memory(
    counts: ModelCounts, dit: DiTConfig, config: ServeConfig, device_type: str, *, text_encoder: bool
) -> Need:
    """``device_type``: cuda or cpu, where ``device`` is 0. ``text_encoder``: False when it is not loaded."""
    device = torch.device(device_type)
    dtype = resolve_dtype(config.dtype, device)
    found = counts.nbytes(dtype, resolve_dtype(config.vae_dtype, device), config.quantization)
    weights, text = found.dit, found.text_encoder if text_encoder else LayeredBytes(0, 1, 0)
    session = _smallest_session(dit, dtype)
    ranks = int(environment_value("LOCAL_WORLD_SIZE") or config.num_gpus)
    parts = f"transformer {weights.total / GB:.1f}, VAE {found.vae / GB:.1f}"
    parts += f", text encoder {text.total / GB:.1f}" if text_encoder else ""
    if device_type == "cpu":
        parts += f", on {ranks} ranks" if ranks > 1 else ""
        return Need(0, ranks * (weights.total + found.vae) + text.total + session, parts)
    host = ranks * weights.pinned if config.dit_cpu_offload else 0
    host += ranks * found.vae if config.vae_cpu_offload else 0
    on_device = (weights.streamed if config.dit_cpu_offload else weights.total) + found.vae
    if config.text_encoder_cpu_offload:
        host += text.pinned + text.outside
        on_device += text.streamed - text.outside
    else:
        on_device += text.total
    return Need(on_device + session, host, parts)


def _smallest_session(config: DiTConfig, dtype: torch.dtype) -> int:
    """Window and prompt of the smallest session that a client may ask for."""
    window = window_bytes(config, FrameSize(MIN_SIDE, MIN_SIDE), config.latent_frames, dtype)
    return window + config.text_len * (2 * config.num_layers * config.dim + config.text_dim) * dtype.itemsize


def require_memory(
    config: ServeConfig,
    folder: CheckpointFolder | None = None,
    *,
    text_encoder: bool = True,
    offered: Collection[str] = REMEDIES,
) -> None:
    """Raises ConfigError if the weights and the smallest session do not fit in the memory that is free now.

    ``folder``: the model of ``config``, if it is open already. ``text_encoder``: False when it is not loaded.
    ``offered``: options that the command has, of which the message names those that would help. Memory that is not
    known to be too small passes. Call it before any rank loads: on a CPU all ranks share the memory.
    """
    device = resolve_device(config.device)
    folder = folder or open_checkpoint(config.model_path, config.schedule, config.load_format)
    counts, dit = ModelCounts.of(folder), folder.dit_config
    free = {"device": free_bytes(device) if device.type == "cuda" else None, "host": known_host_bytes()}

    def lack(changed: ServeConfig) -> tuple[str, int, int, str] | None:
        """Where memory is missing, needed and free bytes there, and the networks; None if all fits."""
        need = needed_memory(counts, dit, changed, device.type, text_encoder=text_encoder)
        for place, needed in (("device", need.device), ("host", need.host)):
            available = free[place]
            if available is not None and needed > available:
                return str(device) if place == "device" else "the host", needed, available, need.parts
        return None

    lacking = lack(config)
    if lacking is None:
        return
    where, needed, available, parts = lacking
    helpful = next((names for names, changed in _changes(config, device, dit, offered) if lack(changed) is None), None)
    fix = f"use {helpful}" if helpful else "no option makes it fit: use a smaller model or more memory"
    raise ConfigError(
        f"--model-path {config.model_path} needs {needed / GB:.1f} GB on {where} ({parts}), "
        f"{available / GB:.1f} GB is free: {fix}",
        field="model_path",
    )


def _changes(
    config: ServeConfig, device: torch.device, dit: DiTConfig, offered: Collection[str]
) -> Iterator[tuple[str, ServeConfig]]:
    """Options that could help, as text, and the configuration with them. What costs least comes first."""
    possible = [(name, value) for name, value in _remedies(config, device, dit) if name in offered]
    # Counts in binary: each option costs more than all those before it together.
    for mask in range(1, 1 << len(possible)):
        chosen = [option for i, option in enumerate(possible) if mask >> i & 1]
        changed = replace(config, **dict(chosen))
        if changed.quantization == "none" or _takes_fp8(changed, device):
            yield " ".join(flag(name) + ("" if value is True else f" {value}") for name, value in chosen), changed


def _remedies(config: ServeConfig, device: torch.device, dit: DiTConfig) -> Iterator[tuple[str, Any]]:
    """(option, value) of everything in REMEDIES that is not set already and may save memory here."""
    on_gpu = device.type == "cuda"
    multiples = dit.dim % _FP8_MULTIPLE == 0 == dit.ffn_dim % _FP8_MULTIPLE
    # Each rank has all weights of the DiT. On a CPU they share one memory.
    fewer_ranks = (
        not on_gpu and config.num_gpus > 1 and config.ulysses_degree is None and config.vae_parallel != "width"
    )
    values = {
        "text_encoder_cpu_offload": True if on_gpu and not config.text_encoder_cpu_offload else None,
        "dtype": "bfloat16" if resolve_dtype(config.dtype, device) == torch.float32 else None,
        "quantization": "fp8" if config.quantization == "none" and multiples else None,
        "num_gpus": 1 if fewer_ranks else None,
        "dit_cpu_offload": True if on_gpu and not config.dit_cpu_offload else None,
    }
    yield from ((name, values[name]) for name in REMEDIES if values[name] is not None)


def _takes_fp8(config: ServeConfig, device: torch.device) -> bool:
    try:
        require_fp8(device, resolve_dtype(config.dtype, device))
    except ConfigError:
        return False
    return True
