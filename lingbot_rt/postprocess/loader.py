"""Weight files -> networks. The architecture follows from the names and shapes of the weights.

Files are ``.safetensors``, or torch's ``.pth`` and ``.pkl``, of which only tensors are unpickled.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lingbot_rt.errors import CheckpointError, one_line
from lingbot_rt.models.file_checks import require_file
from lingbot_rt.postprocess.interpolate import REDUCTIONS, IFNet, Interpolator
from lingbot_rt.postprocess.upscale import RRDBNet, SRVGGNetCompact, Upscaler

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED_UPSCALER = WEIGHTS / "realesr-animevideov3.safetensors"
SHIPPED_INTERPOLATOR = WEIGHTS / "rife-v4.safetensors"

_CONTAINERS = ("params_ema", "params")
"""Real-ESRGAN's files have the weights under these names. The averaged weights, params_ema, are the better ones."""

_RIFE_TRAINING_ONLY = ("block_tea.", "contextnet.", "unet.")
"""Parts of RIFE's file that interpolation does not need: the teacher used in training, and a refinement network."""

_DAMAGE = (
    *(SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError),
    *(struct.error, AssertionError, AttributeError, LookupError, TypeError),
)
"""Errors of reading a damaged file. Those of the second line come from torch's unpickler."""

_LISTED_KEYS = 4

UPSCALER_FILE = "the weights of a Real-ESRGAN generator (.safetensors, .pth)"
INTERPOLATOR_FILE = "the weights of a RIFE network of version 4.0 (.safetensors, .pkl)"

Net = TypeVar("Net", bound=nn.Module)


def load_upscaler(path: Path | None, device: torch.device) -> Upscaler:
    """The upscaler of a weight file. ``path`` None is the shipped one (animevideov3, factor 4).

    Raises CheckpointError when the file is missing, damaged or not a Real-ESRGAN generator.
    """
    path = path or SHIPPED_UPSCALER
    weights = read_weights(path)
    net: SRVGGNetCompact | RRDBNet
    if "conv_first.weight" in weights:
        net = _rrdb(weights, path)
    elif "body.0.weight" in weights:
        net = _compact(weights, path)
    else:
        raise _unknown(path, "Real-ESRGAN generator (SRVGGNetCompact or RRDBNet)", weights)
    return Upscaler(_filled(net, weights, path, device))


def load_interpolator(path: Path | None, device: torch.device) -> Interpolator:
    """The interpolator of a weight file. ``path`` None is the shipped one (RIFE 4.0).

    Raises CheckpointError when the file is missing, damaged or not an IFNet of RIFE 4.0.
    """
    path = path or SHIPPED_INTERPOLATOR
    weights = {k: v for k, v in read_weights(path).items() if not k.startswith(_RIFE_TRAINING_ONLY)}
    blocks = _numbered(weights, r"block(\d+)\.")
    convs = _numbered(weights, r"block0\.convblock\.(\d+)\.")
    if blocks != len(REDUCTIONS) or not convs:
        raise _unknown(path, "RIFE network of version 4.0 (flownet.pkl)", weights)
    widths = [_shape(weights, f"block{i}.conv0.1.0.weight", path)[0] for i in range(blocks)]
    with torch.device("meta"):
        net = IFNet(widths, convs)
    return Interpolator(_filled(net, weights, path, device))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. Raises CheckpointError when it is missing or damaged."""
    if not path.is_file():
        fix = ": run scripts/fetch_models" if path.parent == WEIGHTS else ""
        raise CheckpointError(f"there is no weight file {path}{fix}")
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            found: object = load_file(path)
        else:
            with warnings.catch_warnings():
                # torch warns about forms of pickle that it may not read. What it does not read is an error anyway.
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged or has more than weights: {one_line(error)}") from None
    for container in _CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(container), Mapping):
            found = found[container]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path} has no table of weights")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def _compact(weights: Mapping[str, Tensor], path: Path) -> SRVGGNetCompact:
    layers = _numbered(weights, r"body\.(\d+)\.")
    features = _shape(weights, "body.0.weight", path)[0]
    last = _shape(weights, f"body.{layers - 1}.weight", path)
    scale = math.isqrt(last[0] // 3)
    if layers < 3 or layers % 2 == 0 or scale < 1:
        raise _unknown(path, "SRVGGNetCompact with PReLU", weights)
    with torch.device("meta"):
        return SRVGGNetCompact(features, (layers - 3) // 2, scale)


def _rrdb(weights: Mapping[str, Tensor], path: Path) -> RRDBNet:
    features, channels_in = _shape(weights, "conv_first.weight", path)[:2]
    growth = _shape(weights, "body.0.rdb1.conv1.weight", path)[0]
    folds = {3: 1, 12: 2, 48: 4}
    if channels_in not in folds:
        raise _unknown(path, "RRDBNet for RGB frames", weights)
    with torch.device("meta"):
        return RRDBNet(features, growth, _numbered(weights, r"body\.(\d+)\."), folds[channels_in])


def _numbered(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers names have at the pattern's group. Not the largest, which a forged file can choose."""
    return len({match[1] for match in map(re.compile(pattern).match, weights) if match})


def _shape(weights: Mapping[str, Tensor], name: str, path: Path) -> torch.Size:
    if name not in weights or weights[name].ndim != 4:
        raise CheckpointError(f"{path}: {name} is missing or not a convolution")
    return weights[name].shape


def _filled(net: Net, weights: Mapping[str, Tensor], path: Path, device: torch.device) -> Net:
    """Gives a network of the meta device its weights: float16 on a GPU, else float32."""
    targets = net.state_dict()
    wrong = sorted(targets.keys() ^ weights.keys())
    wrong += [name for name in targets.keys() & weights.keys() if targets[name].shape != weights[name].shape]
    if wrong:
        more = f" and {len(wrong) - _LISTED_KEYS} more" if len(wrong) > _LISTED_KEYS else ""
        kind = type(net).__name__
        raise CheckpointError(
            f"{path} looks like {kind} but does not fit it. Missing, unexpected or misshapen: "
            f"{', '.join(wrong[:_LISTED_KEYS])}{more}"
        )
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    placed = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    # On a GPU float16 convolutions run channels-last. On a CPU it saves a transposition of the frames.
    last = {name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for name, t in placed.items()}
    net.load_state_dict(last, assign=True)
    return net.requires_grad_(False).eval()


def _unknown(path: Path, expected: str, weights: Mapping[str, Tensor]) -> CheckpointError:
    names = ", ".join(list(weights)[:_LISTED_KEYS])
    return CheckpointError(f"{path} is not a {expected}: it has {len(weights)} tensors named {names}, ...")
