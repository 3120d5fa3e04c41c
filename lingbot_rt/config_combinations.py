"""Options that do not go together, or that need each other."""

from __future__ import annotations

import dataclasses
from typing import Any

from lingbot_rt.config_values import flag
from lingbot_rt.errors import ConfigError


def check_combinations(config: Any) -> None:
    """Of a ServeConfig. Raises ConfigError that names the options, and the field of the one to change."""
    if config.ulysses_degree is not None and config.ulysses_degree != config.num_gpus:
        raise ConfigError(
            f"--ulysses-degree {config.ulysses_degree} must equal --num-gpus {config.num_gpus}: all share one session",
            field="ulysses_degree",
        )
    if config.vae_parallel == "width" and config.num_gpus == 1:
        raise ConfigError("--vae-parallel width needs --num-gpus 2 or more", field="vae_parallel")
    if config.snapshot_kv and config.num_gpus > 1:
        raise ConfigError(
            f"--snapshot-kv with --num-gpus {config.num_gpus}: each GPU has some of the keys and values, expected 1",
            field="snapshot_kv",
        )
    if config.enable_upscaling_warmup and not config.warmup:
        raise ConfigError("--enable-upscaling-warmup needs --warmup true", field="enable_upscaling_warmup")
    most = config.ray_max_replicas
    if most is not None and (config.ray_replicas is None or most < config.ray_replicas):
        raise ConfigError(
            f"--ray-max-replicas {config.ray_max_replicas} needs --ray-replicas, and at least as many",
            field="ray_max_replicas",
        )
    for name in ("park_dir", "max_sessions") if config.ray_replicas is not None else ():
        if getattr(config, name) not in (None, 1):
            raise ConfigError(
                f"{flag(name)} {getattr(config, name)} with --ray-replicas: each replica plays one session, and "
                "keeps none for a client that comes back",
                field=name,
            )
    for field in dataclasses.fields(config) if config.record_dir is None else ():
        if field.name.startswith("record_") and getattr(config, field.name) != field.default:
            raise ConfigError(
                f"{flag(field.name)} {getattr(config, field.name)} needs --record-dir, where records are kept",
                field=field.name,
            )
    if config.park_dir is not None and not config.resume_s:
        raise ConfigError("--park-dir needs --resume-s above 0: no client could come back", field="park_dir")
    if config.snapshot_every and config.park_dir is None:
        raise ConfigError(
            f"--snapshot-every {config.snapshot_every} needs --park-dir, where snapshots are kept",
            field="snapshot_every",
        )
    if config.record_total_mb < config.record_max_mb:
        raise ConfigError(
            f"--record-total-mb {config.record_total_mb} must be at least --record-max-mb {config.record_max_mb}",
            field="record_total_mb",
        )
