"""Where frames are saved: a folder of PNGs, or a video in one of three formats."""

from __future__ import annotations

import argparse
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from lingbot_rt.commands.frame_writer import open_writer
from lingbot_rt.commands.options import frames_are_files, output_frames, require_no_frames
from lingbot_rt.errors import ConfigError, OutputFailed


def test_png_folder(tmp_path):
    """Frames become numbered PNGs with the same pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), np.uint8)
    with open_writer(str(tmp_path / "frames"), 16) as write:
        for pixels in frames:
            write(pixels)
    for i, pixels in enumerate(frames):
        with Image.open(tmp_path / "frames" / f"frame_{i:05d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), pixels)
    assert write.result == f"{tmp_path / 'frames'}: 3 frames of 32x16 at 16 frames/s"


def shades(count: int = 10) -> list[np.ndarray]:
    """Grey frames of 65x49, each lighter than the one before."""
    return [np.full((49, 65, 3), 20 * i, np.uint8) for i in range(count)]


def test_mp4(tmp_path):
    """An MP4 has every frame, the frame rate, about the same pixels, and even sides."""
    av = pytest.importorskip("av")
    path = tmp_path / "new" / "clip.mp4"
    with open_writer(str(path), 16) as write:
        for pixels in shades():
            write(pixels)
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 16
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape for frame in decoded] == [(48, 64, 3)] * 10
    assert all(abs(int(frame.mean()) - 20 * i) <= 3 for i, frame in enumerate(decoded))


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif", "CLIP.GIF"])
@pytest.mark.parametrize("fps", [16, 24.5])
def test_animations(name, fps, tmp_path):
    """A WebP or a GIF repeats for ever, has every frame, about the same pixels and the length of the walk."""
    with open_writer(str(tmp_path / name), fps) as write:
        for pixels in shades():
            write(pixels)
    length_ms = 0.0
    with Image.open(tmp_path / name) as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (10, (65, 49), 0)
        for i in range(picture.n_frames):
            picture.seek(i)
            assert abs(int(np.asarray(picture.convert("RGB")).mean()) - 20 * i) <= 3
            length_ms += picture.info["duration"]
    assert abs(length_ms - 10 * 1000 / fps) <= 10


def test_a_gif_is_at_most_50_frames_per_second(tmp_path):
    """Players slow shorter frames down, so the result names the rate that will be seen."""
    with open_writer(str(tmp_path / "clip.gif"), 120) as write:
        write(shades()[0])
    assert write.result.endswith("1 frames of 65x49 at 50 frames/s")


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif"])
def test_a_long_animation_does_not_stay_in_memory(name, tmp_path):
    """What is held while frames come does not grow with their number."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with open_writer(str(tmp_path / name), 16) as write:
        write(noise)
        tracemalloc.start()
        for _ in range(100):
            write(noise)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held < 20 * noise.nbytes


def test_mp4_without_pyav_becomes_an_animation(tmp_path, monkeypatch, capsys):
    """One line says what to install and where the frames go. Files of that name stay."""
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.webp").write_bytes(b"mine")
    with open_writer(str(tmp_path / "clip.mp4"), 16) as write:
        write(shades()[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install" in line
    assert str(tmp_path / "clip-2.webp") in line
    assert write.result.startswith(f"{tmp_path / 'clip-2.webp'}: 1 frames")
    with Image.open(tmp_path / "clip-2.webp") as picture:
        assert picture.format == "WEBP"
    assert (tmp_path / "clip.webp").read_bytes() == b"mine"
    assert not (tmp_path / "clip.mp4").exists()


def test_nothing_is_written_before_the_first_frame(tmp_path):
    """A session that is refused leaves older files, and makes no folder."""
    names = ("clip.mp4", "clip.gif", "clip.webp", "frame_00000.png")
    for name in names:
        (tmp_path / name).write_bytes(b"older")
    for place in (*names[:-1], "frames", ""):
        with open_writer(str(tmp_path / place), 16, overwrite=True) as write:
            pass
        assert write.result is None
    assert all((tmp_path / name).read_bytes() == b"older" for name in names)
    assert not (tmp_path / "frames").exists()


def test_an_earlier_walk_is_removed_on_demand(tmp_path):
    """Only its frames are: other files of the folder stay."""
    for name in ("frame_00000.png", "frame_00033.png", "frame_1.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"older")
    with pytest.raises(ConfigError, match="--overwrite"):
        require_no_frames("--out", str(tmp_path), overwrite=False)
    require_no_frames("--out", str(tmp_path), overwrite=True)
    with open_writer(str(tmp_path), 16, overwrite=True) as write:
        write(shades()[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frame_00000.png", "frame_1.png", "notes.txt"]
    assert (tmp_path / "frame_00000.png").read_bytes() != b"older"


def test_which_places_are_folders(tmp_path, monkeypatch):
    """No ending, a slash at the end, or a folder of that name. Any other unknown ending is refused."""
    monkeypatch.chdir(tmp_path)
    Path("walk.v2").mkdir()
    for text in ("frames", "walk.v2", "run.1/", "clip.mp4/", "."):
        assert frames_are_files(output_frames(text))
    for text in ("clip.mp4", "clip.WebP", "new/clip.gif"):
        assert not frames_are_files(output_frames(text))
    for text in ("clip.mkv", "clip.png", "run.1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"\.mp4, \.webp or \.gif"):
            output_frames(text)


@pytest.mark.parametrize("name", ["frames", "clip.mp4", "clip.webp", "clip.gif"])
def test_a_disk_that_refuses_a_frame(name, tmp_path):
    """The path and the system's reason, also when they come after the start."""
    if name == "clip.mp4":
        pytest.importorskip("av")
    target = tmp_path / "afile" / name
    with pytest.raises(OutputFailed, match=f"{target}: ") as caught, open_writer(str(target), 16) as write:
        (tmp_path / "afile").touch()
        write(np.zeros((64, 64, 3), np.uint8))
    assert "object at" not in str(caught.value)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp"])
def test_a_format_that_refuses_a_frame(name, tmp_path):
    """A picture that the format cannot hold is one named error with the path."""
    if name == "clip.mp4":
        pytest.importorskip("av")
    assert features.check("webp")
    with pytest.raises(OutputFailed, match=f"{name}: "), open_writer(str(tmp_path / name), 16) as write:
        write(np.zeros((2, 20_000, 3), np.uint8))
