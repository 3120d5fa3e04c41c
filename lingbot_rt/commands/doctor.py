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
from lingbot_rt.shapes import FrameSize

if TYPE_CHECKING:
    import torch

    from lingbot_rt.models.dit import DiTConfig

_PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "websockets", "msgspec", "pillow", "numpy")
_OPTIONAL = {
    "av": "MP4 files",
    "simplejpeg": "fast JPEG encoding",
    "isal": "fast lossless encoding",
    "ftfy": "repairs broken characters in prompts",
    "uvloop": "a faster event loop",
    "flash_attn": "FlashAttention kernels",
}
_LARGE_MODEL = "LingBot-World-Fast 14B"
_LARGE_SIZE = FrameSize(832, 480)
_LINE_LENGTH = 90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-path",
        type=path_text,
        default=BUILTIN,
        metavar="TEXT",
        help="model whose memory is estimated (default: %(default)s)",
    )
    add_options_named(parser, ("schedule",))


def run(args: argparse.Namespace) -> int:
    config = ServeConfig(**given_options(args))
    for title, lines in (
        ("versions", _versions()),
        ("optional packages", _optional()),
        ("devices", _devices()),
        ("attention kernels", _kernels()),
        ("memory", _memory(config)),
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
        yield f"{name:<11} {'installed' if installed else 'missing'}: {purpose}"


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
    from lingbot_rt.models.attention import available_backends, resolve_backend
    from lingbot_rt.models.quantize import require_fp8

    for device in _torch_devices()[:1]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with warnings.catch_warnings():
            # torch warns about every kernel it can't use; the table below already says so.
            warnings.simplefilter("ignore")
            states = available_backends(device)
        for name, state in states.items():
            yield f"{device.type}: {name:<11} {state}"
        yield f"{device.type}: auto selects {resolve_backend('auto', device, dtype)}"
        try:
            require_fp8(device, dtype)
            yield f"{device.type}: fp8 linears {'emulated' if device.type == 'cpu' else 'ok'}"
        except ConfigError as error:
            yield str(error)


def _memory(config: ServeConfig) -> Iterator[str]:
    import torch

    from lingbot_rt.engine.memory import GB, free_bytes, window_bytes
    from lingbot_rt.models.checkpoint import open_checkpoint
    from lingbot_rt.models.dit import DiTConfig

    folder = open_checkpoint(config.model_path, config.schedule)
    free = min(free_bytes(device) for device in _torch_devices())
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    weights = _dit_bytes(folder.dit_config, dtype)
    window = window_bytes(folder.dit_config, folder.default_size, folder.dit_config.window_frames, dtype)
    verdict = "fits" if weights + window < free else f"does not fit in {free / GB:.1f} GB"
    yield (
        f"{config.model_path} at {folder.default_size}: weights {weights / GB:.2f} GB, "
        f"window {folder.dit_config.window_frames}: {window / GB:.2f} GB, {verdict}"
    )
    yield from textwrap.wrap(str(folder.schedule), _LINE_LENGTH, subsequent_indent="  ", break_on_hyphens=False)
    large = DiTConfig()
    weights = _dit_bytes(large, torch.bfloat16)
    per_frame = window_bytes(large, _LARGE_SIZE, 1, torch.bfloat16)
    frames = (free - weights - _other_bytes(large)) // per_frame
    smallest = large.sink_frames + large.latent_frames
    verdict = f"window up to {min(frames, large.window_frames)}" if frames >= smallest else "does not fit"
    yield f"{_LARGE_MODEL} at {_LARGE_SIZE}: weights {weights / GB:.1f} GB, {per_frame / GB:.2f} GB per latent frame"
    yield f"  on one device, text encoder on the CPU: {verdict} ({free / GB:.1f} GB free)"


def _other_bytes(large: DiTConfig) -> int:
    """What a session of the 14B needs besides weights and window. Counted on the meta device: nothing is allocated."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from lingbot_rt.engine.dry_run import peak_activations
    from lingbot_rt.engine.memory import camera_bytes
    from lingbot_rt.models.vae import StreamingVAE

    with torch.device("meta"):
        vae = StreamingVAE(AutoencoderKLWan())
    taken = peak_activations(large, vae, _LARGE_SIZE, large.latent_frames, torch.bfloat16, "none")
    return camera_bytes(large, _LARGE_SIZE, large.latent_frames, torch.bfloat16) + taken.forward + taken.decode


def _dit_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """Counted on the meta device: nothing is allocated."""
    import torch

    from lingbot_rt.models.dit import CausalDiT

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CausalDiT(config).parameters()) * dtype.itemsize
