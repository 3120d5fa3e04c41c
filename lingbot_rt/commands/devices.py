"""What a command needs to be there before it starts anything."""

from __future__ import annotations

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError


def require_devices(config: ServeConfig) -> None:
    """Raises ConfigError when --num-gpus asks for devices, or for a share of the heads, that cannot be."""
    if config.num_gpus == 1:
        return
    import torch

    from lingbot_rt.models.checkpoint import open_checkpoint

    if config.device != "cpu" and torch.cuda.device_count() < config.num_gpus:
        raise ConfigError(
            f"--num-gpus {config.num_gpus}: this machine has {torch.cuda.device_count()}", field="num_gpus"
        )
    heads = open_checkpoint(config.model_path).dit_config.num_attention_heads
    degree = config.ulysses_degree or config.num_gpus
    if heads % degree:
        fitting = ", ".join(str(n) for n in range(1, degree) if heads % n == 0)
        raise ConfigError(
            f"--ulysses-degree {degree} does not divide the {heads} heads of {config.model_path}; use {fitting}",
            field="ulysses_degree",
        )
    raise ConfigError(
        f"--num-gpus {config.num_gpus} needs several ranks, which are not available yet; use --num-gpus 1",
        field="num_gpus",
    )
