"""DiT, VAE and whole sessions on the accelerator in float32, against the reference's data."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models.checkpoint import load_vae
from lingbot_rt.models.dit import CausalDiT
from lingbot_rt.models.i2v_condition import preprocess_image
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.controls import ConditionQueue, parse_event, parse_script
from lingbot_rt.session.plan import ChunkPlan
from tests.engine.test_golden_sessions import CASES, psnr
from tests.models.conftest import Rollout, arrays, dit, dit_folder, new_cache  # noqa: F401

from .conftest import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ieee")]

LEAST_PSNR = 60
DIT_ERROR = 1e-3
"""Relative RMS of latents. Attention kernels in float32 may round products to fewer bits; bfloat16 is at 1e-2."""


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["plain", "fused"])
def gpu_dit(request, dit) -> CausalDiT:  # noqa: F811
    moved = copy.deepcopy(dit).to(DEVICE)
    if request.param == "fused":
        moved.fuse_blocks()
    return moved


@pytest.fixture
def on_device(arrays):  # noqa: F811
    """``on_device("dit/rollout_main_inputs")`` -> golden arrays on the accelerator."""
    return lambda name: {key: array.to(DEVICE) for key, array in arrays(name).items()}


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("name", "sink", "window", "prompts", "camera"),
    [
        ("main_outputs", 3, 9, {0: "prompt_embeds"}, True),
        ("prompt_change", 3, 9, {0: "prompt_embeds", 3: "prompt_embeds_alt"}, True),
        ("no_camera", 3, 9, {0: "prompt_embeds"}, False),
        ("sink1_kv7", 1, 7, {0: "prompt_embeds"}, True),
        ("sink3_kv45", 3, 45, {0: "prompt_embeds"}, True),
    ],
)
def test_latents_equal_the_references(gpu_dit, on_device, name, sink, window, prompts, camera):
    """Every chunk of a roll-out, its window sliding, within 1e-3 relative RMS of the reference's latents."""
    cache = new_cache(gpu_dit, sink, window)
    rollout = Rollout(gpu_dit, on_device("dit/rollout_main_inputs"), cache, camera=camera, prompts=prompts)
    for expected in on_device(f"dit/rollout_{name}")["latents"]:
        assert relative_rms(rollout.step(), expected) <= DIT_ERROR


def test_decode_equals_the_references(golden, dit_folder, tmp_path, on_device):  # noqa: F811
    """Nine latent frames, one at a time, are the reference's 33 pixel frames to one level, and so is the condition that
    is encoded from a picture to 1e-3."""
    (tmp_path / "vae").symlink_to(golden("vae"))
    vae = load_vae(dataclasses.replace(dit_folder, path=tmp_path), torch.float32, DEVICE)
    data, features = on_device("vae/decode"), vae.new_features()
    pixels = torch.cat([vae.decode_latent_frame(one, features) for one in data["latents"].split(1, dim=2)], dim=2)
    frames = (pixels[0].permute(1, 2, 3, 0) * 255).to(torch.uint8).cpu().numpy()
    expected = data["frames_uint8"].cpu().numpy()
    assert np.abs(frames.astype(int) - expected).max() <= 1
    assert psnr(frames, expected) >= LEAST_PSNR
    condition = on_device("image_condition/image_condition")
    image = preprocess_image(condition["resized_rgb"].cpu().numpy()).to(DEVICE)
    first, later = vae.encode_condition(image, 3)
    assert (first - condition["chunk0_condition"]).abs().max() <= 1e-3
    assert (later - condition["chunk1_condition"]).abs().max() <= 1e-3


@pytest.mark.parametrize(("name", "alternative"), CASES)
def test_frames_equal_the_references(gpu_pipeline, session_plan, golden_session, name, alternative):
    """Every chunk of every golden session is at 60 dB of the reference's frames or better."""
    record, arrays_of = golden_session(name)
    expected = record["alternatives"][alternative]
    init = record["init"]
    script = init.get("condition_inputs", {}).get("camera_actions")
    queue = ConditionQueue(init["prompt"], None if script is None else parse_script(script))
    camera, plan = CameraPath(), session_plan(init)
    session = SessionState(gpu_pipeline, plan)
    for index, array in enumerate(expected["chunks"]):
        for entry, applied_at in zip(record["events"], expected["applied_at"], strict=False):
            if applied_at == index:
                event = entry["event"]
                queue.apply(parse_event(event["kind"], event["payload"]), event.get("event_id"))
        conditions = queue.sample(plan.latent_frames)
        poses = None if conditions.camera_actions is None else camera.extend(conditions.camera_actions)
        groups = []
        chunk = ChunkPlan(plan.session_id, index, conditions.prompt, poses, conditions.event_id)
        run_chunk(gpu_pipeline, session, chunk, groups.append)
        frames = np.concatenate([group.pixels for group in groups])
        assert frames.shape == arrays_of[array].shape
        assert psnr(frames, arrays_of[array]) >= LEAST_PSNR
