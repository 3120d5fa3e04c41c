"""The configuration of ``lingbot-rt serve``: one frozen object. ``config_sources`` merges it from where it is set.

Each field of ``ServeConfig`` is a flag (``--model-path``), a key of the TOML file (``model_path``) and an environment
variable (``LINGBOT_RT_MODEL_PATH``). Its help text, range, choices and the form of its texts are beside it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lingbot_rt.config_combinations import check_combinations
from lingbot_rt.config_values import (
    flag,
    host_value,
    key_value,
    lower_value,
    origins_value,
    path_value,
    text_value,
)
from lingbot_rt.errors import ConfigError, quoted
from lingbot_rt.hub_cache import snapshot_id

PIPELINE_CLASS_NAME = "LingBotWorldCausalDMDPipeline"
ENV_PREFIX = "LINGBOT_RT_"
BUILTIN = "builtin"

ENDPOINT = "/v1/realtime_video/generate"
"""Path of the WebSocket that carries sessions."""

FormatName = Literal["webp", "jpeg", "raw", "delta-gzip"]
OUTPUT_FORMATS: tuple[FormatName, ...] = typing.get_args(FormatName)
"""The formats in which frames can be sent."""

FLASH_ATTENTION = {
    "fa2": ("flash_attn",),
    "fa3": ("fa3_fwd_interface", "flash_attn_interface"),
    "fa4": ("flash_attn.cute",),
}
"""FlashAttention by generation: the modules that may have its ``flash_attn_func``. The first that imports is used."""


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    group: str,
    form: Callable[[str], str] = text_value,
) -> Any:
    """``form`` turns a text into the form that works; see ``config_values``."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "group": group, "form": form}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    # Model
    model_path: str = _option(
        BUILTIN, "model to serve: builtin, a diffusers folder or a Hugging Face hub id", group="model", form=path_value
    )
    load_format: str = _option(
        "auto",
        "auto: the model's weights; dummy: random weights of its shapes, without a download; the frames are noise; the "
        "model may also be lingbot-world-fast or lingbot-world-v2",
        choices=("auto", "dummy"),
        group="model",
    )
    served_model_name: str | None = _option(
        None, "name of the model in /v1/models (default: taken from the model path)", group="model"
    )
    pipeline_class_name: str = _option(
        PIPELINE_CLASS_NAME, "pipeline class; there is only this one", choices=(PIPELINE_CLASS_NAME,), group="model"
    )
    schedule: str = _option(
        "auto",
        "few-step schedule of the model; v1: LingBot-World-Fast, v2: LingBot-World 2.0; auto: as the model's files "
        "say, else its name, else v1",
        choices=("auto", "v1", "v2"),
        group="model",
    )
    # Device
    num_gpus: int = _option(1, "number of GPUs, with one process per GPU", low=1, high=64, group="device")
    ulysses_degree: int | None = _option(
        None, "GPUs that share a session; must equal --num-gpus (default: all GPUs)", low=1, high=64, group="device"
    )
    vae_parallel: str = _option(
        "auto",
        "how several GPUs decode; none: the first GPU decodes alone; width: each GPU decodes some columns of the "
        "frame; auto: width",
        choices=("auto", "none", "width"),
        group="device",
    )
    peer_memory: str = _option(
        "auto",
        "auto: the GPUs of one host write into each other's memory where they can; false: they exchange through NCCL",
        choices=("auto", "false"),
        group="device",
    )
    cuda_graphs: str = _option(
        "auto",
        "auto: on a GPU, forwards of a full window are launched as CUDA graphs where they can; false: kernel by kernel",
        choices=("auto", "false"),
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
    kv_cache_dtype: str = _option(
        "auto",
        "number format of the attention window; auto: that of the networks; fp8: e4m3, half the memory of bfloat16, "
        "not exact; with fa3 attention is computed in fp8 too",
        choices=("auto", "bfloat16", "fp8"),
        group="device",
    )
    vae_dtype: str = _option(
        "auto",
        "number format of the VAE; auto: bfloat16 on cuda, 62 dB PSNR to float32 on the built-in model; float32 on cpu",
        choices=("auto", "float32", "bfloat16"),
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
        form=path_value,
    )
    dit_cpu_offload: bool = _option(
        False,
        "keep the DiT's blocks on the CPU and move them to the device, two at a time, in every forward",
        group="device",
    )
    text_encoder_cpu_offload: bool = _option(
        False,
        "keep the text encoder on the CPU and move its layers to the device, two at a time, per prompt",
        group="device",
    )
    vae_cpu_offload: bool = _option(
        False, "keep the VAE on the CPU and move it to the device when it is used", group="device"
    )
    attention_backend: str = _option(
        "auto",
        "attention kernel: one of torch's own, or the FlashAttention package of that generation; auto: fa3 on Hopper "
        "if it is installed (pip install fa3-fwd), else cudnn on Hopper and newer, else torch's choice",
        choices=("auto", "sdpa", "cudnn", "flash", "math", *FLASH_ATTENTION),
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
    host: str = _option("127.0.0.1", "address to listen on", group="server", form=host_value)
    port: int = _option(30000, "port to listen on; 0 picks a free port", low=0, high=65535, group="server")
    api_key: str | None = _option(
        None, "key that every request must carry (default: no key is needed)", group="server", form=key_value
    )
    cors_allow_origins: str = _option(
        "*",
        "comma-separated origins that may use the HTTP API and the WebSocket; * is all, none is only the server's page",
        group="server",
        form=origins_value,
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
    interactive_kv_window: bool = _option(
        False,
        "sessions whose init does not say otherwise see only the latest 12 latent frames while the camera moves, and 3 "
        "while it stands still, beside the sink and the chunk itself: faster, and not the same frames",
        group="server",
    )
    log_level: str = _option(
        "info",
        "lowest level that is logged",
        choices=("debug", "info", "warning", "error"),
        group="server",
        form=lower_value,
    )
    log_format: str = _option(
        "text",
        "form of the log; json: one object per line, with the session's id and, at its end, its figures",
        choices=("text", "json"),
        group="server",
        form=lower_value,
    )
    trace_endpoint: str | None = _option(
        None,
        "URL of an OTLP collector (HTTP) that gets a trace of every session, such as http://127.0.0.1:4318; needs the "
        "extra tracing (default: no traces)",
        group="server",
    )
    ray_replicas: int | None = _option(
        None,
        "servers behind this address, each with its own model on --num-gpus, started with Ray Serve on the cluster of "
        "the variable RAY_ADDRESS, else on this machine; needs the extra ray (default: this process alone)",
        low=1,
        high=1000,
        group="server",
    )
    ray_max_replicas: int | None = _option(
        None,
        "as many of them as clients in line may bring up; more than --ray-replicas go away when they are not needed "
        "(default: --ray-replicas)",
        low=1,
        high=1000,
        group="server",
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
        "seconds a client that does not wait in line waits for the running session to end before it is refused",
        low=0,
        high=3600,
        group="limits",
    )
    max_sessions: int = _option(
        1,
        "sessions that are open at a time and take turns on the GPU, chunk by chunk; windows that do not fit together "
        "wait in host memory",
        low=1,
        high=64,
        group="limits",
    )
    max_waiting: int = _option(
        32,
        "most clients that wait in line for the running session to end (the protocol extension queue); further ones "
        "are refused after --session-wait-s; each may hold a message of --max-message-mb",
        low=0,
        high=10**6,
        group="limits",
    )
    chunk_timeout_s: float = _option(
        120.0,
        "seconds without progress after which the engine counts as hung: clients are told and the process ends with "
        "exit code 1; start does not count, nor does a compilation for --session-warmup-limit-s; several GPUs have "
        "--rank-timeout-s instead",
        low=0.1,
        high=86400,
        group="limits",
    )
    session_warmup_limit_s: float = _option(
        300.0,
        "seconds that compiling for a session of a new size may take; such a session is then refused, as soon as the "
        "compilation in work ends: it cannot be interrupted",
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
    history_mb: int = _option(
        512,
        "host memory in MiB, per session, for the chunks that it can go back to (the protocol extension history); 0 "
        "keeps none",
        low=0,
        high=10**6,
        group="limits",
    )
    snapshot_kv: bool = _option(
        False,
        "histories and snapshots also hold keys, values and the VAE's features: a session that goes back then goes on "
        "bit for bit, and takes much more memory",
        group="limits",
    )
    resume_s: float = _option(
        60.0,
        "seconds for which a session is kept after its client's line was lost, for clients with the protocol extension "
        "session; 0 keeps none",
        low=0,
        high=86400,
        group="limits",
    )
    parked_mb: int = _option(
        4096,
        "host memory in MiB for sessions that wait for their clients; beyond it the oldest are kept as small "
        "snapshots, and beyond that they end",
        low=0,
        high=10**7,
        group="limits",
    )
    park_dir: str | None = _option(
        None,
        "folder for the sessions that run when the server stops; the next start resumes them (default: they end)",
        group="limits",
        form=path_value,
    )
    snapshot_every: int = _option(
        0,
        "write a running session to --park-dir every so many chunks, so that a server that is killed loses no more; 0: "
        "only when it stops",
        low=0,
        high=10**6,
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
        None,
        "folder from which an init may name its first frame by path (default: paths are refused)",
        group="limits",
        form=path_value,
    )
    postprocess_model_dir: str | None = _option(
        None,
        "folder of the upscaling and interpolation models that an init may name (default: model paths are refused)",
        group="limits",
        form=path_value,
    )
    record_dir: str | None = _option(
        None, "folder in which sessions are recorded (default: nothing is recorded)", group="limits", form=path_value
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
    profile_dir: str | None = _option(
        None,
        "folder into which POST /debug/profile writes profiler traces; needs --api-key (default: none are written)",
        group="limits",
        form=path_value,
    )
    allow_remote_first_frame: bool = _option(
        False, "allow an init to name its first frame by http(s) URL", group="limits"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked_value(field, getattr(self, field.name), source=flag(field.name))
            object.__setattr__(self, field.name, value)
        check_combinations(self)

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """As browsers send them; ``*`` is all, an empty tuple is none."""
        return () if self.cors_allow_origins == "none" else tuple(self.cors_allow_origins.split(","))

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


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(ServeConfig)


def value_type(field: dataclasses.Field[Any]) -> type:
    """The type of a field: str, int, float or bool. ``X | None`` gives X."""
    hint = _hints()[field.name]
    return next((part for part in typing.get_args(hint) if part is not type(None)), hint)


def parse_value(field: dataclasses.Field[Any], text: str, *, source: str) -> Any:
    """The text of a flag or variable as the field's type. Raises ConfigError that says what is expected."""
    kind = value_type(field)
    if kind is bool:
        lowered = text.strip().lower()
        if lowered not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{source} {quoted(text)}: expected true or false", field=field.name)
        return lowered in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{source} {quoted(text)}: expected {expected_number(field)}", field=field.name) from None


def checked_value(field: dataclasses.Field[Any], value: Any, *, source: str) -> Any:
    """``value`` of the field's type in the form that works. Raises ConfigError that names ``source``."""
    if value is None:
        return None
    rule = field.metadata
    if isinstance(value, str):
        try:
            value = rule["form"](value)
        except ValueError as error:
            raise ConfigError(f"{source} {error}", field=field.name) from None
    if rule["choices"] and value not in rule["choices"]:
        raise ConfigError(f"{source} {quoted(value)}: choose from {', '.join(rule['choices'])}", field=field.name)
    if rule["low"] is not None and not rule["low"] <= value <= rule["high"]:
        raise ConfigError(f"{source} {value}: expected {expected_number(field)}", field=field.name)
    return float(value) if value_type(field) is float else value


def path_of(text: str, source: str) -> Path:
    """A path from a command line, with ``~`` expanded. Raises ConfigError that names ``source``."""
    try:
        return Path(path_value(text))
    except ValueError as error:
        raise ConfigError(f"{source} {error}") from None


def expected_number(field: dataclasses.Field[Any]) -> str:
    """What a number of this field may be, for a message."""
    kind = "a whole number" if value_type(field) is int else "a number"
    return f"{kind} between {field.metadata['low']} and {field.metadata['high']}"
