"""The golden checkpoint as a pipeline, loaded once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.session.plan import SessionPlan
from lingbot_rt.shapes import FrameSize, latent_frames_for


@pytest.fixture(scope="session")
def golden_config(golden) -> ServeConfig:
    # The VAE too: a test may set the device to cuda, where its own default is bfloat16.
    return ServeConfig(
        model_path=str(golden("e2e/model")), device="cpu", dtype="float32", vae_dtype="float32", warmup=False
    )


@pytest.fixture(scope="session")
def pipeline(golden_config) -> Pipeline:
    return load_pipeline(golden_config, lambda status: None)


@pytest.fixture(scope="session")
def small_config(golden_config, tmp_path_factory) -> ServeConfig:
    """The golden checkpoint with a default size that warm-up is soon done with."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(golden_config.model_path, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"default_size": "64x64"}))
    return dataclasses.replace(golden_config, model_path=str(folder))


@pytest.fixture(scope="session")
def session_plan(golden):
    """``session_plan(init map)`` -> the SessionPlan of a golden session's init."""

    def build(init: dict, *, session_id: str = "golden", **changes) -> SessionPlan:
        size = FrameSize.parse(init.get("size", "64x64"))
        picture = (
            Image.open(golden("e2e/first_frame.png")).convert("RGB").resize((size.width, size.height), Image.BICUBIC)
        )
        values = {
            "session_id": session_id,
            "prompt": init.get("prompt", "A quiet street."),
            "first_frame": np.asarray(picture),
            "size": size,
            "latent_frames": latent_frames_for(int(init.get("num_frames", 9))),
            "seed": int(init.get("seed", 42)),
            "num_steps": int(init.get("num_inference_steps", 4)),
            "guidance_scale": float(init.get("guidance_scale", 1)),
            "negative_prompt": init.get("negative_prompt", ""),
            "sink_frames": int(init.get("realtime_causal_sink_size", 3)),
            "window_frames": int(init.get("realtime_causal_kv_cache_num_frames", 9)),
        }
        return SessionPlan(**(values | changes))

    return build


@pytest.fixture(scope="session")
def golden_session(golden):
    """``golden_session("A1_script")`` -> (session.json, arrays of frames.npz)."""

    def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
        folder = Path(golden(f"e2e/{name}/session.json")).parent
        with np.load(folder / "frames.npz") as frames:
            return json.loads((folder / "session.json").read_text()), dict(frames)

    return load
