"""The built-in model: the checkpoint folder that the package brings, and a picture that answers to keys and prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lingbot_rt.engine.flow_match import FlowSchedule, predict_x0, renoise
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.i2v_condition import MASK_CHANNELS, preprocess_image
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.shapes import FrameSize

from .conftest import CPU, new_cache


@pytest.fixture(scope="module")
def world():
    folder = open_checkpoint("builtin")
    return folder, *(load(folder, torch.float32, CPU) for load in (load_dit, load_vae, load_text_encoder))


def picture(size: FrameSize) -> np.ndarray:
    """Four coloured quarters."""
    pixels = np.zeros((size.height, size.width, 3), np.uint8)
    half, middle = size.height // 2, size.width // 2
    pixels[:half, :middle], pixels[:half, middle:] = (220, 40, 40), (40, 200, 40)
    pixels[half:, :middle], pixels[half:, middle:] = (40, 40, 220), (230, 220, 60)
    return pixels


def roll_out(world, keys, prompt="a quiet street", chunks=2, size=None) -> np.ndarray:
    """Frames [n, H, W, 3] in [0, 1] of a session's first chunks with ``keys`` held; None means no camera control."""
    folder, dit, vae, text = world
    size = size or folder.default_size
    cache, features, camera = new_cache(dit, 3, 12, size.tokens_per_frame), vae.new_features(), CameraPath()
    generator = torch.Generator().manual_seed(1)
    conditions = vae.encode_condition(preprocess_image(picture(size)), 3)
    text_kv = dit.text_kv(text.encode(prompt))
    schedule = FlowSchedule(folder.schedule.shift, folder.schedule.steps)
    steps = schedule.steps_for(len(schedule.steps))
    frames = []
    for chunk in range(chunks):
        modulation = None
        if keys is not None:
            modulation = dit.camera_modulation(ray_map(camera.extend((keys,) * 3), size, CPU))
        x = torch.randn(1, vae.z_dim, 3, size.latent_height, size.latent_width, generator=generator)
        for i, step in enumerate(steps):
            channels = torch.cat([x, conditions[min(chunk, 1)]], dim=1)
            x0 = predict_x0(x, dit(channels, step.timestep, text_kv, modulation, cache, 3 * chunk), step.sigma)
            if i + 1 < len(steps):
                x = renoise(x0, torch.randn(x0.shape, generator=generator), steps[i + 1].sigma)
        dit(torch.cat([x0, conditions[min(chunk, 1)]], dim=1), 0.0, text_kv, modulation, cache, 3 * chunk, commit=True)
        frames += [vae.decode_latent_frame(latent, features) for latent in x0.split(1, dim=2)]
    return torch.cat(frames, dim=2)[0].permute(1, 2, 3, 0).numpy()


def test_sizes(world):
    """Size, window and chunk length are as documented, and 1, 2 and 4 ranks can share the heads."""
    folder, dit, vae, _ = world
    assert folder.default_size == FrameSize(160, 96)
    assert folder.default_size.is_whole_tokens
    assert (dit.config.latent_frames, dit.config.sink_frames, dit.config.window_frames) == (3, 3, 12)
    assert dit.config.num_attention_heads % 4 == 0
    assert dit.config.in_channels == 2 * vae.z_dim + MASK_CHANNELS


def test_every_character_has_a_token(world):
    """No prompt gives the unknown token, and ordinary words are few tokens."""
    text = world[3]
    vocabulary = json.loads((world[0].path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) <= text._encoder.config.vocab_size
    assert 2 not in text.token_ids("Übergroße Städte, 城市, 😀 ∑ \x00")
    assert len(text.token_ids("A stone bridge over a quiet river at sunset")) <= 20


def test_frames_show_the_first_picture(world):
    """Frames of chunks 0 and 1 show the colours of the first picture where they are in it."""
    frames, given = roll_out(world, None), picture(world[0].default_size) / 255
    assert frames.shape == (21, 96, 160, 3)
    for frame in (frames[4], frames[-1]):
        assert np.corrcoef(frame.ravel(), given.ravel())[0, 1] > 0.6
    assert frames.std() > 0.15


def test_time_keys_and_prompt_change_frames(world):
    """The picture moves without keys. A held key and another prompt each change it."""
    neutral = roll_out(world, ())
    assert np.abs(neutral[-1] - neutral[8]).mean() > 0.02
    assert np.abs(roll_out(world, ("w",)) - neutral)[9:].mean() > 0.02
    assert np.abs(roll_out(world, ("l",)) - neutral)[9:].mean() > 0.02
    assert np.abs(roll_out(world, (), "snow at night under stars") - neutral).mean() > 0.02


def test_other_sizes(world):
    """A session may ask for any size of whole tokens."""
    size = FrameSize(128, 80)
    assert roll_out(world, ("w",), chunks=1, size=size).shape == (9, 80, 128, 3)
