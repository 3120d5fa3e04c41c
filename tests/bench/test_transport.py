"""``bench transport``: synthetic moving pictures, and both encoders of the four transports."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lingbot_rt.bench.pictures import moving_pictures
from lingbot_rt.bench.transport import measure_transport
from lingbot_rt.cli import main
from lingbot_rt.config import OUTPUT_FORMATS
from lingbot_rt.shapes import FrameSize

SIZE = FrameSize(96, 64)


def test_pictures_move_and_repeat():
    """The same seed gives the same bytes. Each frame is the last one moved by 3 pixels, apart from the grain."""
    frames = moving_pictures(SIZE, 4)
    assert frames.shape == (4, 64, 96, 3)
    assert np.array_equal(frames, moving_pictures(SIZE, 4))
    assert not np.array_equal(frames, moving_pictures(SIZE, 4, seed=1))
    still = np.abs(frames[1].astype(int) - frames[0]).mean()
    moved = np.abs(frames[1][:, :-3].astype(int) - frames[0][:, 3:]).mean()
    assert 0 < moved < still


@pytest.mark.parametrize("frames", [8, 10])
def test_every_transport_is_measured_both_ways(frames):
    """Raw is as large as its pixels, delta-gzip smaller, webp smaller still. Warm-up frames are not counted."""
    done = []
    report = measure_transport(SIZE, frames, lambda: done.append(None))
    assert len(done) == 2 * len(OUTPUT_FORMATS)
    raw_kb = SIZE.bytes_per_frame / 1e3
    for costs in (report.encoder, report.pillow):
        assert list(costs) == list(OUTPUT_FORMATS)
        assert all(cost.ms.count == frames for cost in costs.values())
        assert costs["raw"].kb == raw_kb
        assert 0 < costs["webp"].kb < costs["delta-gzip"].kb < raw_kb
    webp = report.encoder["webp"]
    assert webp.mb_per_s == pytest.approx(raw_kb / webp.ms.mean)


def test_command_line(tmp_path, capsys):
    """The table has one line per transport, the file every figure."""
    figures = tmp_path / "transport.json"
    assert main(["bench", "transport", "--size", "64x64", "--frames", "4", "--json", str(figures)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[3:]] == list(OUTPUT_FORMATS)
    written = json.loads(figures.read_text())
    assert written["size"] == "64x64"
    assert set(written["encoder"]["webp"]) == {"ms", "mb_per_s", "kb"}
