"""Upscaling and interpolation on a real server: frame counts and sizes."""

from __future__ import annotations

import numpy as np
import pytest

from lingbot_rt.client import InitRefused, connect
from tests.e2e.served import wire


@pytest.fixture
def init(golden):
    return {
        "type": "init",
        "prompt": "A quiet street.",
        "first_frame": golden("e2e/first_frame.png").read_bytes(),
        "size": "64x64",
        "fps": 16,
        "num_frames": 9,
        "max_chunks": 2,
        "realtime_output_format": "raw",
    }


def play(server, message) -> list[list[np.ndarray]]:
    with wire(server, message) as client:
        chunks = [client.chunk() for _ in range(message["max_chunks"])]
    for chunk in chunks:
        assert chunk.stats["num_frames"] == len(chunk.frames)
    play.stats = [chunk.stats for chunk in chunks]
    return [chunk.frames for chunk in chunks]


def test_interpolation_goes_on_across_groups_and_chunks(golden_server, init):
    """exp 1 adds a frame before every frame except the session's first. Decoded frames stay unchanged and in order."""
    plain = play(golden_server, init)
    doubled = play(golden_server, init | {"enable_frame_interpolation": True, "frame_interpolation_exp": 1})
    assert [len(frames) for frames in doubled] == [17, 24]
    flat, all_plain = [f for frames in doubled for f in frames], [f for frames in plain for f in frames]
    assert all(np.array_equal(a, b) for a, b in zip(flat[::2], all_plain, strict=True))
    assert all("interpolate_ms" in stats and "upscale_ms" not in stats for stats in play.stats)


def test_upscaling_enlarges_every_frame(golden_server, init):
    """Scale 2 doubles width and height. Shrunk again, the picture is about the same."""
    plain = play(golden_server, init)
    large = play(golden_server, init | {"enable_upscaling": True, "upscaling_scale": 2})
    assert [len(frames) for frames in large] == [9, 12]
    assert large[0][0].shape == (128, 128, 3)
    shrunk = large[1][3].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - plain[1][3]).mean() < 12
    assert all("upscale_ms" in stats for stats in play.stats)


@pytest.mark.parametrize("transport", ["webp", "raw"])
def test_both_together(golden_server, init, transport):
    """With both, frame count and sizes are right, over a lossy and a raw transport."""
    options = {"enable_upscaling": True, "upscaling_scale": 3, "enable_frame_interpolation": True}
    fields = {k: v for k, v in init.items() if k != "type"} | options | {"realtime_output_format": transport}
    with connect(golden_server.http, **fields) as session:
        frames = list(session)
    assert len(frames) == 17 + 24
    assert {frame.pixels.shape for frame in frames} == {(192, 192, 3)}


def test_a_model_path_needs_postprocess_model_dir(golden_server, init):
    """The refusal names the field and the option that allows it."""
    fields = {k: v for k, v in init.items() if k != "type"}
    with (
        connect(golden_server.http, **fields, enable_upscaling=True, upscaling_model_path="x.pth") as session,
        pytest.raises(InitRefused, match=r"upscaling_model_path.*--postprocess-model-dir"),
    ):
        next(session)
