"""The configuration of ``lingbot-rt serve``: one frozen object, merged from defaults < TOML file < environment < flags.

Each field of ``ServeConfig`` is a flag (``--model-path``), a key of the TOML file (``model_path``) and an environment
variable (``LINGBOT_RT_MODEL_PATH``). Its help text, range and choices are beside it.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lingbot_rt.errors import ConfigError
from lingbot_rt.hub_cache import snapshot_id

PIPELINE_CLASS_NAME = "LingBotWorldCausalDMDPipeline"
ENV_PREFIX = "LINGBOT_RT_"
BUILTIN = "builtin"

ENDPOINT = "/v1/realtime_video/generate"
"""Path of the WebSocket that carries sessions."""

FormatName = Literal["webp", "jpeg", "raw", "delta-gzip"]
OUTPUT_FORMATS: tuple[FormatName, ...] = typing.get_args(FormatName)
"""The formats in which frames can be sent."""


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    group: str,
) -> Any:
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    # Model
    model_path: str = _option(
        BUILTIN, "model to serve: builtin, a diffusers folder or a Hugging Face hub id", group="model"
    )
    served_model_name: str | None = _option(
        None, "name of the model in /v1/models (default: taken from the model path)", group="model"
    )
    pipeline_class_name: str = _option(
        PIPELINE_CLASS_NAME, "pipeline class; there is only this one", choices=(PIPELINE_CLASS_NAME,), group="model"
    )
    # Device
    num_gpus: int = _option(1, "number of GPUs, with one process per GPU", low=1, high=64, group="device")
    ulysses_degree: int | None = _option(
        None, "GPUs that share a session; must equal --num-gpus (default: all GPUs)", low=1, high=64, group="device"
    )
    vae_parallel: str = _option(
        "none",
        "how several GPUs decode; none: the first GPU decodes alone; width: each GPU decodes some columns of the frame",
        choices=("none", "width"),
        group="device",
    )
    rank_timeout_s: float = _option(
        30.0,
        "seconds within which the service ends after one of its processes dies, fails or hangs",
        low=5,
        high=3600,
        group="device",
    )
    device: str = _option("auto", "device that runs the networks", choices=("auto", "cuda", "cpu"), group="device")
    dtype: str = _option(
        "auto",
        "number format of the networks; auto: bfloat16 on cuda, float32 on cpu",
        choices=("auto", "float32", "bfloat16"),
        group="device",
    )
    quantization: str = _option(
        "none",
        "fp8: the linear layers of the DiT's blocks in float8; not exact; needs compute capability 8.9 or newer",
        choices=("none", "fp8"),
        group="device",
    )
    vae_dtype: str = _option(
        "float32",
        "number format of the VAE; bfloat16 is faster on a GPU and not exact",
        choices=("float32", "bfloat16"),
        group="device",
    )
    compile: str = _option(
        "auto",
        "whether to compile the networks; auto: only on cuda",
        choices=("auto", "true", "false"),
        group="device",
    )
    compile_cache: str | None = _option(
        None,
        "folder that keeps compiled code between starts (default: torch's, in the temporary folder)",
        group="device",
    )
    dit_cpu_offload: bool = _option(
        False,
        "keep the DiT's blocks on the CPU and move them to the device, two at a time, in every forward",
        group="device",
    )
    text_encoder_cpu_offload: bool = _option(
        False, "keep the text encoder on the CPU and move it to the device when it is used", group="device"
    )
    vae_cpu_offload: bool = _option(
        False, "keep the VAE on the CPU and move it to the device when it is used", group="device"
    )
    attention_backend: str = _option(
        "auto",
        "self-attention kernel: one of torch's own, or a FlashAttention package of that version",
        choices=("auto", "sdpa", "cudnn", "flash", "math", "flash-attn2", "flash-attn3", "flash-attn4"),
        group="device",
    )
    deterministic_noise: str = _option(
        "device",
        "where a session's noise is drawn; cpu: a seed gives the same noise on every device",
        choices=("device", "cpu"),
        group="device",
    )
    cpu_threads: int | None = _option(
        None, "threads for computing on the CPU (default: physical cores)", low=1, high=256, group="device"
    )
    warmup: bool = _option(True, "run every shape once before /health reports ready", group="device")
    enable_upscaling_warmup: bool = _option(
        False, "include the upscaling and interpolation networks in the warm-up", group="device"
    )
    # Server
    host: str = _option("127.0.0.1", "address to listen on", group="server")
    port: int = _option(30000, "port to listen on; 0 picks a free port", low=0, high=65535, group="server")
    api_key: str | None = _option(None, "key that every request must carry (default: no key is needed)", group="server")
    cors_allow_origins: str = _option(
        "*", "comma-separated origins that may use the HTTP API and the WebSocket; * is all", group="server"
    )
    allowed_hosts: str | None = _option(
        None,
        "comma-separated names under which this server may be reached, beside IP addresses, localhost, --host, the "
        "machine's name and the hosts in --cors-allow-origins; .example.com is every subdomain, * every name (default: "
        "* while --cors-allow-origins is *, because every page may connect then anyway; otherwise no further name)",
        group="server",
    )
    default_output_format: str = _option(
        "delta-gzip",
        "how frames are sent when an init names no format",
        choices=OUTPUT_FORMATS,
        group="server",
    )
    log_level: str = _option(
        "info", "lowest level that is logged", choices=("debug", "info", "warning", "error"), group="server"
    )
    # Limits
    max_message_mb: int = _option(64, "largest message of a client, MiB", low=1, high=1024, group="limits")
    max_pixels: int = _option(
        1280 * 720, "largest width x height of a session, pixels", low=64 * 64, high=4096 * 4096, group="limits"
    )
    max_connections: int = _option(
        1000,
        "most open connections, HTTP and WebSocket together; further ones are answered with 503",
        low=1,
        high=10**6,
        group="limits",
    )
    init_timeout_s: float = _option(
        10.0, "seconds within which a client must send a valid init", low=0.1, high=3600, group="limits"
    )
    session_wait_s: float = _option(
        1.0,
        "seconds a client waits for the running session to end before it is refused",
        low=0,
        high=3600,
        group="limits",
    )
    chunk_timeout_s: float = _option(
        120.0,
        "seconds without progress after which the engine counts as hung: clients are told and the process ends with "
        "exit code 1; start and compilation do not count; several GPUs have --rank-timeout-s instead",
        low=0.1,
        high=86400,
        group="limits",
    )
    pause_limit_s: float = _option(
        300.0,
        "seconds a session may stay paused before it ends with an error",
        low=1,
        high=86400,
        group="limits",
    )
    send_timeout_s: float = _option(
        20.0,
        "seconds after which a client that stopped reading is disconnected",
        low=0.5,
        high=3600,
        group="limits",
    )
    first_frame_dir: str | None = _option(
        None, "folder from which an init may name its first frame by path (default: paths are refused)", group="limits"
    )
    postprocess_model_dir: str | None = _option(
        None,
        "folder of the upscaling and interpolation models that an init may name (default: model paths are refused)",
        group="limits",
    )
    record_dir: str | None = _option(
        None, "folder in which sessions are recorded (default: nothing is recorded)", group="limits"
    )
    record_sessions: str = _option(
        "all",
        "which sessions are recorded: all, or only those whose init asks for it",
        choices=("all", "asked"),
        group="limits",
    )
    record_max_mb: int = _option(1024, "largest record of one session, MiB", low=1, high=10**6, group="limits")
    record_total_mb: int = _option(
        16384,
        "largest size of --record-dir, MiB; the oldest records are deleted to make room",
        low=1,
        high=10**8,
        group="limits",
    )
    allow_remote_first_frame: bool = _option(
        False, "allow an init to name its first frame by http(s) URL", group="limits"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.ulysses_degree is not None and self.ulysses_degree != self.num_gpus:
            raise ConfigError(
                f"--ulysses-degree {self.ulysses_degree} must equal --num-gpus {self.num_gpus}: all share one session",
                field="ulysses_degree",
            )
        if self.vae_parallel == "width" and self.num_gpus == 1:
            raise ConfigError("--vae-parallel width needs --num-gpus 2 or more", field="vae_parallel")
        if self.record_total_mb < self.record_max_mb:
            raise ConfigError(
                f"--record-total-mb {self.record_total_mb} must be at least --record-max-mb {self.record_max_mb}",
                field="record_total_mb",
            )

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return tuple(origin.strip() for origin in self.cors_allow_origins.split(",") if origin.strip())

    def records(self, asked: bool) -> bool:
        """Whether a session is recorded. ``asked``: its init says ``record``."""
        return self.record_dir is not None and (asked or self.record_sessions == "all")

    @property
    def model_id(self) -> str:
        """The served name: the given one, else the hub id or the folder's name."""
        if self.served_model_name:
            return self.served_model_name
        if self.model_path == BUILTIN:
            return "lingbot-rt-builtin"
        if not Path(self.model_path).exists():
            return self.model_path
        folder = Path(self.model_path).resolve()
        return snapshot_id(folder) or folder.name


def flag(name: str) -> str:
    """``model_path`` -> ``--model-path``."""
    return "--" + name.replace("_", "-")


def value_type(field: dataclasses.Field[Any]) -> type:
    """The type of a field: str, int, float or bool. ``X | None`` gives X."""
    hint = typing.get_type_hints(ServeConfig)[field.name]
    return next((part for part in typing.get_args(hint) if part is not type(None)), hint)


def load_config(
    flags: Mapping[str, Any], *, file: str | None = None, environment: Mapping[str, str] | None = None
) -> ServeConfig:
    """Merges the sources; flags win over the environment, and the environment wins over the TOML ``file``.

    ``flags`` holds only the flags that were given. ``environment``: None reads os.environ.
    Raises ConfigError that names the source, the field, the value and what is valid.
    """
    fields = {field.name: field for field in dataclasses.fields(ServeConfig)}
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(Path(file), fields)
    for name, text in (os.environ if environment is None else environment).items():
        key = name.removeprefix(ENV_PREFIX).lower()
        if name.startswith(ENV_PREFIX) and key in fields:
            values[key] = parse_value(fields[key], text, source=name)
    values |= flags
    return ServeConfig(**values)


def parse_value(field: dataclasses.Field[Any], text: str, *, source: str) -> Any:
    """The text of a flag or variable as the field's type. Raises ConfigError that says what is expected."""
    kind = value_type(field)
    if kind is bool:
        lowered = text.strip().lower()
        if lowered not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{source} {text!r}: expected true or false", field=field.name)
        return lowered in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{source} {text!r}: expected {expected}", field=field.name) from None


def _from_file(path: Path, fields: Mapping[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}", field="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}", field="config") from None
    values = {key.replace("-", "_"): value for key, value in table.items()}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"--config {path}: unknown key {key!r}; known: {', '.join(sorted(fields))}", field=key)
        kind = value_type(fields[key])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value)
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"--config {path}: {key} = {value!r} must be {kind.__name__}", field=key)
    return values


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    if value is None:
        return
    rule = field.metadata
    name = flag(field.name)
    if rule["choices"] and value not in rule["choices"]:
        raise ConfigError(f"{name} {value}: choose from {', '.join(rule['choices'])}", field=field.name)
    if rule["low"] is not None and not rule["low"] <= value <= rule["high"]:
        raise ConfigError(f"{name} {value}: must be between {rule['low']} and {rule['high']}", field=field.name)
