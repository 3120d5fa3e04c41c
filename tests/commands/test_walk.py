"""Keys, pictures, clips and the summary of a walk."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.client.session import ChunkStats
from lingbot_rt.commands.client import Measure, keys_at, parse_fields, spread
from lingbot_rt.commands.clip import open_clip
from lingbot_rt.commands.walk import chunks_for, drawn_scene, first_picture, parse_keys
from lingbot_rt.errors import ConfigError
from lingbot_rt.shapes import FrameSize


def test_keys():
    """Counts repeat, letters together are held together, a dash rests."""
    assert parse_keys("w*2, wa,-*2") == (("w",), ("w",), ("w", "a"), (), ())


@pytest.mark.parametrize("text", ["", "w*", "q*2", "w*2,", "w2", "*3", "w*-1"])
def test_wrong_keys_are_named(text):
    """A step that is no step is an error, not a pause."""
    with pytest.raises(ConfigError, match="--keys"):
        parse_keys(text)


def test_as_many_chunks_as_the_keys_need():
    """The last chunk may be padded; --chunks wins."""
    actions = parse_keys("w*7")
    assert chunks_for(actions, 3, None) == 3
    assert chunks_for(actions, 3, 5) == 5


def test_a_live_walk_holds_the_keys_of_the_frame_that_is_shown():
    """The first pixel frame is a latent frame of its own, then each covers four; after the walk nothing is held."""
    actions = parse_keys("w,a,s")
    assert [keys_at(actions, i) for i in (0, 1, 4, 5, 8, 9)] == [("w",), ("a",), ("a",), ("s",), ("s",), ()]


def test_pictures(tmp_path):
    """A file's bytes, or a picture that opens at the asked size; a missing file is named."""
    file = tmp_path / "picture"
    file.write_bytes(b"bytes")
    assert first_picture(str(file), FrameSize(64, 64)) == b"bytes"
    with Image.open(io.BytesIO(drawn_scene(FrameSize(96, 64)))) as picture:
        assert picture.size == (96, 64)
    with Image.open(io.BytesIO(first_picture(None, FrameSize(96, 64)))) as picture:
        assert picture.width >= 64
    with pytest.raises(ConfigError, match="no-such-file"):
        first_picture("no-such-file", FrameSize(64, 64))


def test_png_folder(tmp_path):
    """Frames become numbered PNGs with the very pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), np.uint8)
    with open_clip(str(tmp_path / "frames"), 16) as clip:
        for pixels in frames:
            clip.add(pixels)
    for i, pixels in enumerate(frames):
        with Image.open(tmp_path / "frames" / f"frame_{i:05d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_mp4(tmp_path):
    """An MP4 has every frame, the frame rate, nearly the pixels, and even sides."""
    av = pytest.importorskip("av")
    frames = [np.full((49, 65, 3), 20 * i, np.uint8) for i in range(10)]
    path = tmp_path / "new" / "clip.mp4"
    with open_clip(str(path), 16) as clip:
        for pixels in frames:
            clip.add(pixels)
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 16
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape for frame in decoded] == [(48, 64, 3)] * 10
    assert all(abs(int(frame.mean()) - 20 * i) <= 3 for i, frame in enumerate(decoded))


def test_mp4_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    """The extra is named, and the way without it."""
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"lingbot-rt\[video\]"):
        open_clip(str(tmp_path / "clip.mp4"), 16)


def test_fields_of_an_init():
    """Values are JSON where they can be, else text."""
    assert parse_fields(["fps=25", "realtime_output_pacing=true", "negative_prompt=blurred"]) == {
        "fps": 25,
        "realtime_output_pacing": True,
        "negative_prompt": "blurred",
    }


def stats(index: int, total: float, dit: float, vae: float) -> ChunkStats:
    return ChunkStats.from_message(
        {"chunk_index": index, "num_frames": 12, "chunk_total_ms": total, "dit_ms": dit, "vae_ms": vae}
    )


def test_summary(monkeypatch):
    """Rates leave the first chunk out; latency ends at the first frame with the event id or a later one."""
    clock = iter([0.0, 0.5, 0.75, 1.0, 1.5, 2.0])
    monkeypatch.setattr("lingbot_rt.commands.client.time.monotonic", lambda: next(clock))
    measure = Measure()  # at 0.0
    measure.frame(0, None)  # at 0.5
    measure.sent(1)  # at 0.75
    measure.frame(0, None)  # at 1.0
    measure.frame(1, None)  # at 1.5
    measure.frame(1, 2)  # at 2.0
    text = measure.summary([stats(0, 900, 700, 100), stats(1, 100, 70, 20), stats(2, 200, 140, 40)])
    assert "init to first frame  0.50 s" in text
    assert "steady rate          2.0 frames/s" in text
    assert "p50 150 ms, p95 200 ms" in text
    assert "DiT 105 ms, VAE 30 ms, overhead 15 ms" in text
    assert "key to frame         p50 1250 ms" in text


def test_summary_of_nothing():
    assert Measure().summary([]) == "no frames came"


def test_spread():
    """p95 of twenty values is the nineteenth."""
    assert spread(range(1, 21)) == "p50 10 ms, p95 19 ms"
