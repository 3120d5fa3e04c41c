"""What a command needs to be there before it starts anything."""

from __future__ import annotations

import os

from lingbot_rt.config import ServeConfig


def is_follower() -> bool:
    """Whether torchrun started this process as one of the ranks that help rank 0."""
    return "MASTER_PORT" in os.environ and int(os.environ.get("RANK", "0")) > 0


def require_devices(config: ServeConfig) -> None:
    """Raises ConfigError when --num-gpus asks for devices, or for a share of the heads, that cannot be."""
    if config.num_gpus == 1 and "WORLD_SIZE" not in os.environ:
        return
    from lingbot_rt.parallel.launch import require_ranks

    require_ranks(config)
