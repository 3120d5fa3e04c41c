"""``lingbot-rt doctor``: versions, devices, attention kernels, and which models fit in memory."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import textwrap
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lingbot_rt import __version__
from lingbot_rt.commands.options import add_options_named, given_options, path_text
from lingbot_rt.commands.output import say
from lingbot_rt.config import BUILTIN, ServeConfig

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "websockets", "msgspec", "pillow", "numpy")
_OPTIONAL = {
    "av": "MP4 files",
    "simplejpeg": "fast JPEG encoding",
    "isal": "fast lossless encoding",
    "ftfy": "repairs broken characters in prompts",
    "uvloop": "a faster event loop",
    "flash_attn": "FlashAttention 2 kernels",
    "fa3_fwd_interface": "FlashAttention 3 kernels, for Hopper",
}
_LARGE_MODEL = "LingBot-World-Fast 14B"
_LINE_LENGTH = 90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-path",
        type=path_text,
        default=BUILTIN,
        metavar="TEXT",
        help="model whose memory is estimated (default: %(default)s)",
    )
    add_options_named(parser, ("schedule", "load_format"))


def run(args: argparse.Namespace) -> int:
    config = ServeConfig(**given_options(args))
    for title, lines in (
        ("versions", _versions()),
        ("optional packages", _optional()),
        ("devices", _devices()),
        ("attention kernels", _kernels()),
        ("memory", _memory(config)),
        (f"{_LARGE_MODEL} on one GPU", _cards()),
    ):
        say(title)
        for line in lines:
            say(f"  {line[:_LINE_LENGTH]}")
    return 0


def _versions() -> Iterator[str]:
    yield f"lingbot-rt {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name in _PACKAGES:
        yield f"{name} {importlib.metadata.version(name)}"


def _optional() -> Iterator[str]:
    for name, purpose in _OPTIONAL.items():
        installed = importlib.util.find_spec(name) is not None
        yield f"{name:<17} {'installed' if installed else 'missing'}: {purpose}"


def _torch_devices() -> list[torch.device]:
    import torch

    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]


def _devices() -> Iterator[str]:
    import torch

    from lingbot_rt.engine.memory import GB, available_host_bytes, free_bytes

    yield f"cpu: {torch.get_num_threads()} threads, {available_host_bytes() / GB:.1f} GB free"
    for device in _torch_devices():
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            name = torch.cuda.get_device_name(device)
            yield f"{device}: {name}, {free_bytes(device) / GB:.1f} of {total / GB:.1f} GB free"
    yield f"disk: {shutil.disk_usage('.').free / GB:.0f} GB free in this folder"


def _kernels() -> Iterator[str]:
    import torch

    from lingbot_rt.errors import ConfigError
    from lingbot_rt.models.attention import available_backends, missing_package, resolve_backend
    from lingbot_rt.models.quantize import require_fp8

    for device in _torch_devices()[:1]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with warnings.catch_warnings():
            # torch warns about every kernel it can't use; the table below already says so.
            warnings.simplefilter("ignore")
            states = available_backends(device, dtype)
        for name, state in states.items():
            yield f"{device.type}: {name:<11} {state}"
        selected = resolve_backend("auto", device, dtype)
        hint = missing_package(selected, device)
        yield f"{device.type}: auto selects {selected}"
        if hint:
            yield hint
        try:
            require_fp8(device, dtype)
            yield f"{device.type}: fp8 linears {'emulated' if device.type == 'cpu' else 'ok'}"
        except ConfigError as error:
            yield str(error)


def _memory(config: ServeConfig) -> Iterator[str]:
    from lingbot_rt.engine.device import resolve_dtype
    from lingbot_rt.engine.memory import GB, free_bytes, window_bytes
    from lingbot_rt.engine.model_memory import ModelCounts
    from lingbot_rt.models.checkpoint import open_checkpoint

    folder = open_checkpoint(config.model_path, config.schedule, config.load_format)
    free = min(free_bytes(device) for device in _torch_devices())
    device = _torch_devices()[0]
    dtype = resolve_dtype("auto", device)
    weights = ModelCounts.of(folder).nbytes(dtype, dtype).dit.total
    window = window_bytes(folder.dit_config, folder.default_size, folder.dit_config.window_frames, dtype)
    verdict = "fits" if weights + window < free else f"does not fit in {free / GB:.1f} GB"
    yield (
        f"{config.model_path} at {folder.default_size}: weights {weights / GB:.2f} GB, "
        f"window {folder.dit_config.window_frames}: {window / GB:.2f} GB, {verdict}"
    )
    yield from textwrap.wrap(str(folder.schedule), _LINE_LENGTH, subsequent_indent="  ", break_on_hyphens=False)


def _cards() -> Iterator[str]:
    from lingbot_rt.engine.capacity import CARDS_GB, PRECISIONS, SIZES, capacity_table
    from lingbot_rt.engine.memory import GB, free_bytes

    gpus = [device for device in _torch_devices() if device.type == "cuda"]
    here = {f"{device}, {free_bytes(device) / GB:.1f} GB free": free_bytes(device) for device in gpus}
    _, *rows = capacity_table(here | {f"{size} GB": int(size * GB) for size in CARDS_GB})
    yield "largest window in latent frames, - is none; text encoder on the CPU, VAE bfloat16"
    first, width = max(len(row[0]) for row in rows), 10
    yield " " * first + "".join(f"  {precision.name:<{2 * width - 2}}" for precision in PRECISIONS)
    yield " " * first + "".join(f"{size!s:>{width}}" for size in SIZES) * len(PRECISIONS)
    for name, *cells in rows:
        yield f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells)
