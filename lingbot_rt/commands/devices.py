"""What a command needs to be there before it starts anything."""

from __future__ import annotations

from lingbot_rt.config import ServeConfig


def require_devices(config: ServeConfig) -> None:
    """Raises ConfigError when --num-gpus asks for devices, or for a share of the heads, that cannot be."""
    if config.num_gpus == 1:
        return
    from lingbot_rt.parallel.launch import require_ranks

    require_ranks(config)
