"""The Real-ESRGAN networks against ncnn with the original files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lingbot_rt.postprocess.loader import load_upscaler
from lingbot_rt.postprocess.upscale import RRDBNet, Upscaler

CPU = torch.device("cpu")


def as_input(frame) -> torch.Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1)[None] / 255


def test_shipped_network_is_the_original(upscaler, data):
    """The shipped weights in our SRVGGNetCompact give what ncnn gives with the original file."""
    golden = data("animevideov3")
    np.testing.assert_allclose(upscaler.net(as_input(golden["input"]))[0], golden["x4"], atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_every_factor_is_the_original_rounded(upscaler, data, scale):
    """Frames at 2, 3 and 4 times are ncnn's networks of that factor, to the nearest of 256 levels, each frame alike."""
    golden = data("animevideov3")
    frames = torch.from_numpy(golden["input"])[None].repeat(2, 1, 1, 1)
    larger = upscaler(frames, scale)
    expected = np.clip(golden[f"x{scale}"], 0, 1).transpose(1, 2, 0) * 255
    assert larger.dtype == torch.uint8
    for frame in larger:
        np.testing.assert_allclose(frame.numpy(), expected, atol=0.51)


def test_large_generator_is_the_original(converter, data, tmp_path):
    """A small RRDBNet out of ncnn's own file format, converted and loaded, gives what ncnn gives."""
    golden = data("rrdb_tiny")
    save_file(converter.rrdb_weights(str(golden["param"]), golden["bin"].tobytes()), tmp_path / "tiny.safetensors")
    net = load_upscaler(tmp_path / "tiny.safetensors", CPU).net
    np.testing.assert_allclose(net(as_input(golden["input"]))[0], golden["x4"], atol=1e-5)


@pytest.mark.parametrize("fold", [2, 4])
def test_odd_sides_are_padded_and_cropped(fold):
    """A folding RRDBNet takes 9 x 13 pixels; inside, the result is that of the same frame padded by hand."""
    torch.manual_seed(0)
    net = RRDBNet(features=8, growth=4, blocks=1, fold=fold).eval()
    x = torch.rand(1, 3, 9, 13)
    with torch.no_grad():
        y = net(x)
        whole = net(F.pad(x, (0, -13 % fold, 0, -9 % fold), mode="replicate"))
    assert y.shape == (1, 3, 9 * net.scale, 13 * net.scale)
    torch.testing.assert_close(y, whole[..., : y.shape[2], : y.shape[3]])
    frames = torch.randint(0, 256, (1, 9, 13, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert Upscaler(net)(frames, 3).shape == (1, 27, 39, 3)


def test_memory_grows_with_pixels_and_factor(upscaler):
    """The estimate doubles with the pixels and knows the extra resize of a factor that is not the network's."""
    small = upscaler.memory_bytes(120, 160, 4)
    assert upscaler.memory_bytes(240, 160, 4) == 2 * small
    assert upscaler.memory_bytes(120, 160, 3) > small
