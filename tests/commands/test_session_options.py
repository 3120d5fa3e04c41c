"""Keys, first frames, frame writers and the client's summary."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.cli import main
from lingbot_rt.client.protocol import ChunkStats
from lingbot_rt.client.start_picture import start_picture
from lingbot_rt.commands.client import keys_at
from lingbot_rt.commands.options import parse_init_fields
from lingbot_rt.commands.session_options import (
    chunks_for,
    first_frame_bytes,
    parse_keys,
    parse_script,
)
from lingbot_rt.commands.walk import WalkMetrics, WalkProgress, p50_p95
from lingbot_rt.errors import ConfigError


def test_keys():
    """Counts repeat, letters together are held together, a dash is no key, capitals are the same keys."""
    assert parse_keys("w*2, wA,-*2") == (("w",), ("w",), ("w", "a"), (), ())


@pytest.mark.parametrize("text", ["", "w*", "q*2", "w*2,", "w2", "*3", "w*-1", "w*0"])
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
    """A file's bytes, or the picture of the package. A missing file is named."""
    file = tmp_path / "picture"
    file.write_bytes(b"bytes")
    assert first_frame_bytes(str(file)) == b"bytes"
    assert first_frame_bytes(None) == start_picture()
    with Image.open(io.BytesIO(start_picture())) as picture:
        assert picture.width >= 832
    with pytest.raises(ConfigError, match="no-such-file"):
        first_frame_bytes("no-such-file")


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
    monkeypatch.setattr("lingbot_rt.commands.walk.time.monotonic", lambda: next(clock))
    metrics = WalkMetrics()  # at 0.0
    metrics.frame_received(0, None)  # at 0.5
    metrics.event_sent(1)  # at 0.75
    metrics.frame_received(0, None)  # at 1.0
    metrics.frame_received(1, None)  # at 1.5
    metrics.frame_received(1, 2)  # at 2.0
    text = metrics.summary([stats(0, 900, 700, 100), stats(1, 100, 70, 20), stats(2, 200, 140, 40)])
    assert "in 1 chunk\n" in metrics.summary([stats(0, 900, 700, 100)])
    assert "init to first frame  0.50 s" in text
    assert "steady rate          2.0 frames/s" in text
    assert "p50 150 ms, p95 200 ms" in text
    assert "DiT 105 ms, VAE 30 ms, overhead 15 ms" in text
    assert "key to frame         p50 1250 ms" in text


def test_summary_without_frames():
    """It says so instead of dividing by zero."""
    assert WalkMetrics().summary([]) == "no frames received"


def test_progress_without_a_terminal(capsys):
    """A line on standard error every ten seconds says how far the walk is. A short walk says nothing."""
    clock = iter([0.0, 1.0, 9.0, 10.0, 15.0, 20.0])
    progress = WalkProgress(105, lambda: next(clock))
    for _ in range(2):
        progress.update()
    assert capsys.readouterr().err == ""
    for _ in range(3):
        progress.update()
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["3 of 105 frames, 0.3 frames/s", "5 of 105 frames, 0.2 frames/s"]


def test_progress_on_a_terminal(monkeypatch):
    """A bar that says what it waits for, and counts from the first frame on."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    progress = WalkProgress(2)
    assert "waiting for the first frame" in terminal.getvalue()
    for _ in range(2):
        progress.update()
    progress.close()
    assert "walking" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_p50_p95():
    """p95 of twenty values is the nineteenth."""
    assert p50_p95(range(1, 21)) == "p50 10 ms, p95 19 ms"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--poses", "missing.npy"], "--poses 'missing.npy': there is no such file"),
        (["--poses", "text.npy"], r"--poses 'text.npy': 'text.npy': expected a NumPy file"),
        (["--poses", "lens.npy"], r"--poses 'lens.npy': .*an array of shape \[4\], expected numbers of \[n, 4, 4\]"),
        (["--poses", "poses.npy", "--keys", "w"], "--poses: expected either --poses or --keys"),
        (["--poses", "poses.npy", "--intrinsics", "missing.npy"], "--intrinsics 'missing.npy': there is no such file"),
        (["--poses", "poses.npy", "--intrinsics", "poses.npy"], r"intrinsics: an array of shape \[8, 4, 4\]"),
        (["--intrinsics", "lens.npy"], "--intrinsics: expected --poses with it"),
        (["--intrinsics-size", "832x480"], "--intrinsics-size: expected --poses with it"),
    ],
)
def test_wrong_paths_are_one_line(words, named, tmp_path, monkeypatch, capsys):
    """Before a model is loaded or a server is asked; the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    np.save("poses.npy", np.tile(np.eye(4), (8, 1, 1)))
    np.save("lens.npy", np.array([500.0, 500, 416, 240]))
    (tmp_path / "text.npy").write_text("no array")
    for verb in (["generate"], ["client", "--url", "http://127.0.0.1:9"]):
        assert main([*verb, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(named, line)


def test_a_path_and_live_keys_exclude_each_other(tmp_path, capsys):
    """--live presses keys."""
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (8, 1, 1)))
    assert main(["client", "--url", "http://127.0.0.1:9", "--live", "--poses", str(tmp_path / "poses.npy")]) == 2
    assert "--live: expected --keys with it, not --poses" in capsys.readouterr().err
