"""Keys, first frames, frame writers and the client's summary."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.client.protocol import ChunkStats
from lingbot_rt.commands.client import ClientMetrics, keys_at, p50_p95
from lingbot_rt.commands.frame_writer import open_writer
from lingbot_rt.commands.options import parse_init_fields
from lingbot_rt.commands.session_options import (
    chunks_for,
    first_frame_bytes,
    parse_keys,
    parse_script,
    procedural_scene,
)
from lingbot_rt.errors import ConfigError
from lingbot_rt.shapes import FrameSize


def test_keys():
    """Counts repeat, letters together are held together, a dash is no key."""
    assert parse_keys("w*2, wa,-*2") == (("w",), ("w",), ("w", "a"), (), ())


@pytest.mark.parametrize("text", ["", "w*", "q*2", "w*2,", "w2", "*3", "w*-1"])
def test_wrong_keys_are_named(text):
    """A malformed step is an error."""
    with pytest.raises(ConfigError, match="--keys"):
        parse_keys(text)


def test_scripts_have_at_most_512_latent_frames():
    """A session takes scripts of 512 latent frames. A longer one is refused with its length."""
    assert len(parse_script("w*500,l*12")) == 512
    with pytest.raises(ConfigError, match=r"^--keys: 513 latent frames, at most 512$"):
        parse_script("w*500,l*13")


def test_as_many_chunks_as_the_keys_need():
    """The last chunk may be longer than the keys. --chunks wins."""
    actions = parse_keys("w*7")
    assert chunks_for(actions, 3, None) == 3
    assert chunks_for(actions, 3, 5) == 5


def test_a_live_session_holds_the_keys_of_the_shown_frame():
    """Pixel frame 0 is a latent frame of its own, later latent frames have four. After the script no key is held."""
    actions = parse_keys("w,a,s")
    assert [keys_at(actions, i) for i in (0, 1, 4, 5, 8, 9)] == [("w",), ("a",), ("a",), ("s",), ("s",), ()]


def test_first_frames(tmp_path):
    """A file's bytes, a preset, or a procedural scene of the asked size. A missing file is named."""
    file = tmp_path / "picture"
    file.write_bytes(b"bytes")
    assert first_frame_bytes(str(file), FrameSize(64, 64)) == b"bytes"
    with Image.open(io.BytesIO(procedural_scene(FrameSize(96, 64)))) as picture:
        assert picture.size == (96, 64)
    with Image.open(io.BytesIO(first_frame_bytes(None, FrameSize(96, 64)))) as picture:
        assert picture.width >= 64
    with pytest.raises(ConfigError, match="no-such-file"):
        first_frame_bytes("no-such-file", FrameSize(64, 64))


def test_png_folder(tmp_path):
    """Frames become numbered PNGs with the same pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), np.uint8)
    with open_writer(str(tmp_path / "frames"), 16) as write:
        for pixels in frames:
            write(pixels)
    for i, pixels in enumerate(frames):
        with Image.open(tmp_path / "frames" / f"frame_{i:05d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_mp4(tmp_path):
    """An MP4 has every frame, the frame rate, about the same pixels, and even sides."""
    av = pytest.importorskip("av")
    frames = [np.full((49, 65, 3), 20 * i, np.uint8) for i in range(10)]
    path = tmp_path / "new" / "clip.mp4"
    with open_writer(str(path), 16) as write:
        for pixels in frames:
            write(pixels)
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 16
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape for frame in decoded] == [(48, 64, 3)] * 10
    assert all(abs(int(frame.mean()) - 20 * i) <= 3 for i, frame in enumerate(decoded))


def test_mp4_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    """The error names the extra to install, and the alternative."""
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"lingbot-rt\[video\].*folder"), open_writer(str(tmp_path / "x.mp4"), 16):
        pass


def test_fields_of_an_init():
    """A value is JSON, or text if it is not JSON."""
    assert parse_init_fields(["fps=25", "realtime_output_pacing=true", "negative_prompt=blurred"]) == {
        "fps": 25,
        "realtime_output_pacing": True,
        "negative_prompt": "blurred",
    }


def stats(index: int, total: float, dit: float, vae: float) -> ChunkStats:
    return ChunkStats.from_message(
        {"chunk_index": index, "num_frames": 12, "chunk_total_ms": total, "dit_ms": dit, "vae_ms": vae}
    )


def test_summary(monkeypatch):
    """Rates leave out the first chunk. Latency ends at the first frame with the event id or a later one."""
    clock = iter([0.0, 0.5, 0.75, 1.0, 1.5, 2.0])
    monkeypatch.setattr("lingbot_rt.commands.client.time.monotonic", lambda: next(clock))
    metrics = ClientMetrics()  # at 0.0
    metrics.frame_received(0, None)  # at 0.5
    metrics.event_sent(1)  # at 0.75
    metrics.frame_received(0, None)  # at 1.0
    metrics.frame_received(1, None)  # at 1.5
    metrics.frame_received(1, 2)  # at 2.0
    text = metrics.summary([stats(0, 900, 700, 100), stats(1, 100, 70, 20), stats(2, 200, 140, 40)])
    assert "init to first frame  0.50 s" in text
    assert "steady rate          2.0 frames/s" in text
    assert "p50 150 ms, p95 200 ms" in text
    assert "DiT 105 ms, VAE 30 ms, overhead 15 ms" in text
    assert "key to frame         p50 1250 ms" in text


def test_summary_without_frames():
    """It says so instead of dividing by zero."""
    assert ClientMetrics().summary([]) == "no frames received"


def test_p50_p95():
    """p95 of twenty values is the nineteenth."""
    assert p50_p95(range(1, 21)) == "p50 10 ms, p95 19 ms"
