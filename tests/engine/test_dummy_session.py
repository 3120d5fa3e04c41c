"""A session of a model with random weights: the whole path, the frames, and what the server says of it."""

from __future__ import annotations

import shutil

import msgspec
import numpy as np
import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.engine import Engine
from lingbot_rt.offline import play
from lingbot_rt.server.model_entry import model_entry
from lingbot_rt.session.messages import Init


@pytest.fixture
def configurations(golden, tmp_path) -> str:
    """A folder with the three config.json of the golden model and nothing else."""
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        shutil.copyfile(golden(f"e2e/model/{part}/config.json"), tmp_path / part / "config.json")
    return str(tmp_path)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
async def test_frames_are_noise_but_sound(configurations, golden, quantization):
    """Three chunks: no frame is constant or clipped to two colours, and another prompt gives other frames."""
    config = ServeConfig(
        model_path=configurations, load_format="dummy", device="cpu", warmup=False, quantization=quantization
    )
    engine = Engine(config)
    await engine.start()
    picture = golden("e2e/first_frame.png").read_bytes()
    init = Init(prompt="A street.", first_frame=picture, size="64x64", seed=1, max_chunks=3)
    clips = []
    for prompt in ("A street.", "A street.", "A lake at night."):
        chunks = [chunk.frames async for chunk in play(engine, config, msgspec.structs.replace(init, prompt=prompt))]
        clips.append(np.concatenate(chunks))
    info = engine.model_info
    await engine.stop()
    first, again, other = clips
    assert first.shape == (9 + 12 + 12, 64, 64, 3)
    assert min(frame.std() for frame in first) > 5
    assert min(len(np.unique(frame)) for frame in first) > 50
    assert np.isin(first, (0, 255)).mean() < 0.5
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert model_entry(config, info, engine.status, busy=False, waiting=0, warm_sizes=())["load_format"] == "dummy"
