"""The shipped networks, loaded once, and synthetic motion whose true middle frame is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_rt.postprocess.loader import load_interpolator, load_upscaler

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def upscaler():
    return load_upscaler(None, CPU)


@pytest.fixture(scope="session")
def interpolator():
    return load_interpolator(None, CPU)


@pytest.fixture(scope="session")
def converter():
    """scripts/convert_models.py as a module."""
    spec = importlib.util.spec_from_file_location("convert_models", ROOT / "scripts" / "convert_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data():
    """``data("animevideov3")`` -> the arrays of a golden file."""
    return lambda name: dict(np.load(DATA / f"{name}.npz"))


@pytest.fixture(scope="session")
def panning():
    """``panning(count, height, width, step)`` -> uint8 frames of a texture that moves ``step`` pixels a frame."""

    def frames(count: int, height: int, width: int, step: int) -> Tensor:
        wide = width + step * (count - 1)
        generator = torch.Generator().manual_seed(5)
        picture = torch.zeros(1, 3, height, wide)
        for cell, weight in ((6, 0.7), (12, 0.9), (24, 0.7)):
            noise = torch.rand(1, 3, height // cell + 2, wide // cell + 2, generator=generator) - 0.5
            picture += weight * F.interpolate(noise, size=(height, wide), mode="bicubic")
        picture = ((picture[0] + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
        return torch.stack([picture[:, step * i : step * i + width] for i in range(count)])

    return frames
