"""The built-in model: a checkpoint folder like any other, made once, whose picture answers to keys and prompts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lingbot_rt.engine.flow_match import FlowSchedule, predict_x0, renoise
from lingbot_rt.errors import CheckpointError
from lingbot_rt.models import builtin
from lingbot_rt.models.builtin import builtin_folder
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.i2v_condition import MASK_CHANNELS, preprocess_image
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.shapes import FrameSize
from tests.preloaded import PreloadedProcess

from .conftest import CPU, new_cache


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """A user cache for this module."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("LINGBOT_RT_CACHE", str(path))
        yield path


@pytest.fixture(scope="module")
def world(cache_dir):
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
    text_kv, steps = (
        dit.text_kv(text.encode(prompt)),
        FlowSchedule(folder.schedule.shift, folder.schedule.steps).steps_for(4),
    )
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


def test_made_once_and_deterministic(cache_dir, world, tmp_path, monkeypatch):
    """A second start finds the folder. Made again elsewhere, its files have the same bytes."""
    folder = builtin_folder()
    assert folder == world[0].path
    assert [path.name for path in cache_dir.iterdir()] == [folder.name]
    monkeypatch.setenv("LINGBOT_RT_CACHE", str(tmp_path))
    again = builtin_folder()
    for part in folder.rglob("*.*"):
        assert part.read_bytes() == (again / part.relative_to(folder)).read_bytes(), part.name


def test_processes_that_start_together(tmp_path, monkeypatch):
    """Two processes that make the folder at the same time leave one complete folder and nothing else."""
    cache, logs = tmp_path / "cache", [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setenv("LINGBOT_RT_CACHE", str(cache))
    code = "from lingbot_rt.models.builtin import builtin_folder; print(builtin_folder())"
    processes = [PreloadedProcess([sys.executable, "-c", code], log=log) for log in logs]
    assert [process.wait() for process in processes] == [0, 0]
    first, second = (Path(log.read_text().strip()) for log in logs)
    assert first == second
    assert [path.name for path in cache.iterdir()] == [first.name]
    open_checkpoint(str(first))


def test_a_process_that_is_second_takes_the_folder_of_the_first(tmp_path, monkeypatch):
    """If another process finishes its folder while this one makes its own, this one returns the other's."""
    monkeypatch.setenv("LINGBOT_RT_CACHE", str(tmp_path))
    folder = tmp_path / f"builtin-{builtin._key()}"

    def make_behind_another(own: Path) -> None:
        for made, name in ((folder, "first"), (own, "second")):
            made.mkdir()
            (made / "maker").write_text(name)

    monkeypatch.setattr(builtin, "_make", make_behind_another)
    assert builtin_folder() == folder
    assert (folder / "maker").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture
def quick_make(monkeypatch):
    """Makes folders of the right form without computing weights."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")

    monkeypatch.setattr(builtin, "_make", make)


def refusal() -> str:
    with pytest.raises(CheckpointError) as caught:
        builtin_folder()
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_where_the_cache_is(monkeypatch, tmp_path):
    """Variables that are empty count as unset, ~ is the home folder, and a relative XDG folder is not one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for own in ("", " \n"):
        for shared in ("", " ", "relative"):
            monkeypatch.setenv("LINGBOT_RT_CACHE", own)
            monkeypatch.setenv("XDG_CACHE_HOME", shared)
            assert builtin.cache_root() == tmp_path / ".cache" / "lingbot_rt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/shared")
    assert builtin.cache_root() == Path("/var/shared/lingbot_rt")
    monkeypatch.setenv("LINGBOT_RT_CACHE", "~/worlds")
    assert builtin.cache_root() == tmp_path / "worlds"


def test_a_user_without_a_home_folder(monkeypatch):
    """Without a home folder the message names the variable that stands in for it."""
    monkeypatch.setenv("LINGBOT_RT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert "LINGBOT_RT_CACHE" in refusal()


def test_a_file_in_place_of_the_cache(quick_make, monkeypatch, tmp_path):
    """A file where the cache or a folder above it should be: path, the system's reason and the variable."""
    (tmp_path / "file").write_text("mine")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("LINGBOT_RT_CACHE", str(cache))
        message = refusal()
        assert str(cache) in message
        assert "File exists" in message or "Not a directory" in message
        assert "LINGBOT_RT_CACHE" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("mkdir", PermissionError(13, "Permission denied")),
        ("write_bytes", OSError(28, "No space left on device")),
        ("rename", OSError(30, "Read-only file system")),
    ],
)
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, function, error):
    """Folder, reason and variable are named, and nothing is left behind: no folder, no half model."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * 1000)

    def refuse(self, *args, **options):
        raise error

    monkeypatch.setattr(builtin, "_make", make)
    monkeypatch.setenv("LINGBOT_RT_CACHE", str(tmp_path / "new" / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, function, refuse)
        message = refusal()
    assert str(tmp_path / "new" / "cache") in message
    assert error.strerror in message
    assert "LINGBOT_RT_CACHE" in message
    assert list(tmp_path.iterdir()) == []
    assert builtin_folder().is_dir()


def test_a_read_only_package(monkeypatch, tmp_path):
    """Files copied from a read-only package can be written by their owner, and only the model's files are copied."""
    source = Path(shutil.copytree(builtin.BUILTIN_CONFIGS, tmp_path / "package"))
    (source / "vae" / "._config.json").write_bytes(b"\0\x05\x16\x07")
    for path in (source, *source.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    monkeypatch.setattr(builtin, "BUILTIN_CONFIGS", source)
    monkeypatch.setenv("LINGBOT_RT_CACHE", str(tmp_path / "cache"))
    folder = builtin_folder()
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o200, path
        assert not path.name.startswith("._")
    open_checkpoint("builtin")


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
