"""What a command needs to be there before it starts anything."""

from __future__ import annotations

import os
from pathlib import Path

from lingbot_rt.config import ServeConfig, flag
from lingbot_rt.errors import ConfigError


def is_follower() -> bool:
    """Whether torchrun started this process as one of the ranks that help rank 0."""
    return "MASTER_PORT" in os.environ and int(os.environ.get("RANK", "0")) > 0


def require_devices(config: ServeConfig) -> None:
    """Raises ConfigError when --num-gpus asks for devices, or for a share of the heads, that cannot be."""
    if config.num_gpus == 1 and "WORLD_SIZE" not in os.environ:
        return
    from lingbot_rt.parallel.launch import require_ranks

    require_ranks(config)


def require_folders(config: ServeConfig) -> None:
    """Raises ConfigError when a folder that was named cannot be used; the one for records is made."""
    for name in ("first_frame_dir", "postprocess_model_dir"):
        folder = getattr(config, name)
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{flag(name)} {folder}: there is no such folder", field=name)
    if config.record_dir is None:
        return
    try:
        Path(config.record_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--record-dir {config.record_dir}: {error.strerror}", field="record_dir") from None
    if not os.access(config.record_dir, os.W_OK):
        raise ConfigError(f"--record-dir {config.record_dir} cannot be written", field="record_dir")
