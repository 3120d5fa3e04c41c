"""Flags and variables of the reference's server that lingbot_rt has under another name, or in another way.

Each is mapped to an option, accepted without effect, or refused with the reason. Nothing is dropped in silence: what
has no effect is named in one line on standard error. docs/reference-flags.md lists them all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lingbot_rt.config import ENV_PREFIX, FLASH_ATTENTION
from lingbot_rt.config_values import environment_value, flag
from lingbot_rt.errors import ConfigError, quoted

Kind = Literal["mapped", "no effect", "refused"]


@dataclass(slots=True)
class Translation:
    """What a command line's flags of the reference come to."""

    fields: dict[str, Any]  # values of ServeConfig's fields; has those of the other flags from the start
    warnings: list[str] = field(default_factory=list)  # one line each
    idle: list[str] = field(default_factory=list)  # flags without effect

    def set(self, source: str, name: str, value: Any) -> None:
        """Raises ConfigError if another flag has set the field to another value."""
        if self.fields.setdefault(name, value) != value:
            other = f"{flag(name)} {str(self.fields[name]).lower()}"
            raise ConfigError(f"{source} does not go together with {other}: keep one of them", field=name)


Apply = Callable[[str, str, Translation], None]
"""Takes a flag, its value and what it changes. Raises ConfigError."""


@dataclass(frozen=True, slots=True)
class ReferenceFlag:
    """One flag that ServeConfig does not have."""

    name: str
    form: str  # the placeholder after the flag
    kind: Kind
    here: str  # what it does here, or why it is refused
    apply: Apply


def _refused(name: str, form: str, reason: str) -> ReferenceFlag:
    def apply(source: str, text: str, to: Translation) -> None:
        raise ConfigError(f"{source} {quoted(text)}: {reason}", field=source.removeprefix("--"))

    return ReferenceFlag(name, form, "refused", reason, apply)


def _idle(name: str, form: str, here: str) -> ReferenceFlag:
    return ReferenceFlag(name, form, "no effect", here, lambda source, text, to: to.idle.append(source))


def _only(name: str, value: str, reason: str) -> ReferenceFlag:
    """Only ``value`` is taken: it is what happens here anyway."""

    def apply(source: str, text: str, to: Translation) -> None:
        if text.lower() != value:
            raise ConfigError(f"{source} {quoted(text)}: expected {value}; {reason}", field=source.removeprefix("--"))

    return ReferenceFlag(name, value, "no effect", f"only {value}: {reason}", apply)


def _mapped(name: str, form: str, here: str, apply: Apply) -> ReferenceFlag:
    return ReferenceFlag(name, form, "mapped", here, apply)


def _chosen(source: str, text: str, values: Mapping[str, Any]) -> Any:
    """The value of ``values`` for ``text``, in any case. Raises ConfigError."""
    if text.lower() not in values:
        raise ConfigError(f"{source} {quoted(text)}: choose from {', '.join(values)}", field=source.removeprefix("--"))
    return values[text.lower()]


_SWITCH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def _torch_compile(source: str, text: str, to: Translation) -> None:
    to.set(f"{source} {text}", "compile", "true" if _chosen(source, text, _SWITCH) else "false")


def _parallel_decode(source: str, text: str, to: Translation) -> None:
    is_split = _chosen(source, text, _SWITCH)
    if not is_split or to.fields.get("vae_parallel") != "width":
        to.set(f"{source} {text}", "vae_parallel", "auto" if is_split else "none")


def _parallel_decode_mode(source: str, text: str, to: Translation) -> None:
    modes = ("spatial", "spatial_shard", "auto", "tiled", "patch")
    _chosen(source, text, dict.fromkeys(modes))
    if text.lower() in ("tiled", "patch"):
        to.idle.append(source)


def _layerwise_offload(source: str, text: str, to: Translation) -> None:
    if _chosen(source, text, _SWITCH):
        to.set(f"{source} {text}", "dit_cpu_offload", True)


def _sequence_degree(source: str, text: str, to: Translation) -> None:
    if not text.isdecimal():
        raise ConfigError(f"{source} {quoted(text)}: expected a whole number", field="sp-degree")
    to.set(f"{source} {text}", "ulysses_degree", int(text))


def _vae_precision(source: str, text: str, to: Translation) -> None:
    names = {"fp32": "float32", "bf16": "bfloat16"}
    to.set(f"{source} {text}", "vae_dtype", _chosen(source, text, names))


def _warmup_mode(source: str, text: str, to: Translation) -> None:
    to.set(f"{source} {text}", "warmup", _chosen(source, text, {"server": True, "request": True, "off": False}))


def _model_id(source: str, text: str, to: Translation) -> None:
    from lingbot_rt.models.schedule import version_of

    version = version_of(text)
    if version is None:
        raise ConfigError(f"{source} {quoted(text)}: expected the hub id of a LingBot-World model", field="model-id")
    to.set(f"{source} {quoted(text)}", "schedule", version)


def _window_precision(source: str, text: str, to: Translation) -> None:
    if text.lower() in ("none", "auto", "bf16", "bfloat16"):
        return
    to.set(f"{source} {quoted(text)}", "kv_cache_dtype", "fp8")
    if text.lower() != "fp8":
        to.warnings.append(
            f"{source} {quoted(text)}: the window is kept in fp8 (--kv-cache-dtype fp8), the smallest format here: "
            "half the memory of bfloat16 and twice that of int4; a session that does not fit is refused with the "
            "window that would"
        )


REFERENCE_FLAGS = (
    _mapped("--model-id", "HUB_ID", "`--schedule v1` or `v2`, by the model that the id names", _model_id),
    _mapped("--sp-degree", "N", "`--ulysses-degree N`", _sequence_degree),
    _mapped("--enable-torch-compile", "true|false", "`--compile true` or `false`", _torch_compile),
    _mapped(
        "--vae-config.use-parallel-decode",
        "true|false",
        "`--vae-parallel auto` or `none`",
        _parallel_decode,
    ),
    _mapped(
        "--vae-config.parallel-decode-mode",
        "spatial|spatial_shard|auto|tiled|patch",
        "a split decode is always by columns of the frame, as in spatial; tiled and patch have no effect",
        _parallel_decode_mode,
    ),
    _mapped("--vae-precision", "fp32|bf16", "`--vae-dtype float32` or `bfloat16`", _vae_precision),
    _mapped("--dit-layerwise-offload", "true|false", "true: `--dit-cpu-offload true`", _layerwise_offload),
    _mapped("--warmup-mode", "server|request|off", "`--warmup true`; off: `--warmup false`", _warmup_mode),
    _mapped(
        "--kv-cache-quant",
        "int4|fp8|none",
        "`--kv-cache-dtype fp8`, for int4 too, with a warning: the window takes twice the memory of int4; none, auto "
        "and bf16 change nothing",
        _window_precision,
    ),
    _only("--tp-size", "1", "GPUs share a session by --ulysses-degree"),
    _only("--ring-degree", "1", "GPUs share a session by --ulysses-degree"),
    _only("--dp-size", "1", "a server runs one session; start a second server for a second one"),
    _only("--enable-cfg-parallel", "false", "all GPUs share each forward, guided or not"),
    _only("--use-fsdp-inference", "false", "each GPU has all weights; --dit-cpu-offload saves memory"),
    _only("--model-type", "diffusion", "this is the only kind"),
    _idle("--performance-mode", "TEXT", "offload and compilation have options of their own"),
    _idle("--attention-backend-config", "TEXT", "kernels have no settings here"),
    _idle("--image-encoder-cpu-offload", "true|false", "the model has no image encoder"),
    _idle("--pin-cpu-memory", "true|false", "copies to the GPU use pinned memory where that helps"),
    _idle("--trust-remote-code", "true|false", "code of a model folder is never run"),
    _idle("--enable-layerwise-nvtx-marker", "true|false", "`--profile` of `lingbot-rt bench pipeline` writes a trace"),
    _idle(
        "--realtime-max-sessions",
        "N",
        "`--max-sessions` of this server take turns, and `--max-waiting` others wait in line",
    ),
    _idle("--batching-max-size", "N", "sessions are not batched"),
    _idle("--batching-delay-ms", "N", "sessions are not batched"),
    _idle("--master-port", "N", "processes find each other at a free port"),
    _idle("--scheduler-port", "N", "there is no scheduler process"),
    _idle("--strict-ports", "true|false", "a port that is taken always ends the start"),
    _idle("--output-path", "PATH", "nothing is written; `--record-dir` records sessions"),
    _idle("--input-save-path", "PATH", "nothing is written; `--record-dir` records sessions"),
    _idle("--webui", "true|false", "the page is always served, at `/`"),
    _refused("--flow-shift", "N", "shift and steps belong together: use --schedule v1 (shift 10) or v2 (shift 5)"),
    _refused("--revision", "TEXT", "the newest revision is fetched; name the folder of another one as --model-path"),
    _refused("--lora-path", "PATH", "LoRA weights are not loaded; merge them into the transformer's weights"),
    _refused("--transformer-path", "PATH", "all parts are read from --model-path; put the part into that folder"),
    _refused("--vae-path", "PATH", "all parts are read from --model-path; put the part into that folder"),
    _refused(
        "--vae-config.taehv-checkpoint-path", "PATH", "only the model's own VAE decodes; --vae-dtype bfloat16 is faster"
    ),
)

_KERNELS = {"fa": "auto", "torch_sdpa": "sdpa"}
SWITCHES = {
    "SGLANG_LINGBOT_ENABLE_INTERACTIVE_KV_WINDOW": ("interactive_kv_window", "a small window is not enlarged for it"),
}
"""Variables of the reference that set an option here, unless its flag or its own variable does; what is different."""

VARIABLES = {
    "SGLANG_LINGBOT_LAZY_VAE_ENCODE_BLACK_FRAMES": "only the blank frames of two chunks are ever encoded, whatever the "
    "value",
}
"""Variables of the reference without effect: what is different here."""


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    section = parser.add_argument_group("reference", "flags of the reference's server; see docs/reference-flags.md")
    for each in REFERENCE_FLAGS:
        optional_value = {"nargs": "?", "const": "true"} if each.form == "true|false" else {}
        section.add_argument(
            each.name,
            metavar=each.form,
            default=argparse.SUPPRESS,
            help=f"{each.kind}: {each.here}".replace("`", "").replace("%", "%%"),
            **optional_value,  # type: ignore[arg-type]
        )


def translate(
    args: argparse.Namespace, fields: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> Translation:
    """The reference's flags in ``args`` and its variables, as values of ServeConfig's fields and warnings.

    ``fields``: the values of the flags that ServeConfig has. Raises ConfigError.
    """
    to = Translation(dict(fields))
    if "attention_backend" in to.fields:
        _kernel(to)
    for each in REFERENCE_FLAGS:
        text = getattr(args, each.name.removeprefix("--").replace("-", "_"), None)
        if text is not None:
            each.apply(each.name, text.strip(), to)
    if to.idle:
        to.warnings.append(f"no effect here: {', '.join(to.idle)}; see docs/reference-flags.md")
    for name, (option, here) in SWITCHES.items():
        is_own_set = option in to.fields or environment_value(ENV_PREFIX + option.upper(), environment) is not None
        if _is_on(name, environment) and not is_own_set:
            to.fields[option] = True
            to.warnings.append(f"{name}: sets {flag(option)} here; {here}")
    for name, here in VARIABLES.items():
        if _is_on(name, environment):
            to.warnings.append(f"{name}: no effect here: {here}")
    return to


def _is_on(name: str, environment: Mapping[str, str]) -> bool:
    return (environment_value(name, environment) or "").lower() not in ("", "0", "false", "no", "off")


def _kernel(to: Translation) -> None:
    """The reference's names of attention kernels. Like it, takes torch's kernel without the package."""
    asked = str(to.fields["attention_backend"]).strip().lower()
    if asked in _KERNELS:
        to.fields["attention_backend"] = _KERNELS[asked]
    elif asked in FLASH_ATTENTION:
        to.fields["attention_backend"] = asked
        if not any(map(_is_installed, FLASH_ATTENTION[asked])):
            to.fields["attention_backend"] = "auto"
            package = "fa3-fwd" if asked == "fa3" else "flash-attn"
            to.warnings.append(
                f"--attention-backend {asked}: its package is not installed (pip install {package}), so torch's "
                "kernels are used"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the package around a module is missing
        return False
