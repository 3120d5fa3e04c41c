"""``bench pipeline`` at tiny size on a CPU: the real engine with random weights, and each of its outputs."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lingbot_rt.bench.flops import Flops
from lingbot_rt.bench.pipeline import Workload, profile_chunk, run_chunks
from lingbot_rt.bench.random_model import random_pipeline
from lingbot_rt.bench.roofline import Roofline
from lingbot_rt.cli import main
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import CapacityError, ConfigError
from lingbot_rt.shapes import FrameSize

SMALL = FrameSize(64, 64)
STAGES = ["prepare", "camera", "denoise", "context", "DiT", "VAE", "first frames", "after denoise", "total"]


@pytest.fixture(scope="module")
def pipeline(golden):
    return random_pipeline(ServeConfig(model_path=str(golden("e2e/model")), device="cpu"))


def test_steady_chunks_have_a_full_window(pipeline):
    """Without ``warm`` a chunk more than fills the window comes first, and each measured chunk attends to all of it."""
    done = []
    measured = run_chunks(
        pipeline, Workload(size=SMALL, window_frames=21, sink_frames=3, chunks=2), lambda: done.append(None)
    )
    assert len(done) == 8 + 2
    assert measured.visible_frames == [21, 21]
    assert [chunk.result.chunk_index for chunk in measured.chunks] == [8, 9]
    assert all(chunk.result.num_frames == 12 for chunk in measured.chunks)
    assert measured.peak_memory_gb is None


def test_first_frames_come_before_the_context_pass(pipeline):
    """A chunk's first frames are on the host after denoise and before the chunk's end."""
    measured = run_chunks(pipeline, Workload(size=SMALL, warm=0, chunks=2), lambda: None)
    for chunk in measured.chunks:
        stages = chunk.stages()
        assert list(stages) == STAGES
        assert 0 < stages["after denoise"] < stages["first frames"] < stages["total"]
        assert stages["DiT"] == pytest.approx(stages["denoise"] + stages["context"])


def test_openings_are_chunks_0_to_3(pipeline):
    """``opening`` measures the first four chunks of each session, after one warm-up session."""
    done = []
    workload = Workload(size=SMALL, window_frames=18, sink_frames=9, chunks=8, opening=True)
    measured = run_chunks(pipeline, workload, lambda: done.append(None))
    assert len(done) == 4 + 8
    assert [chunk.result.chunk_index for chunk in measured.chunks] == [0, 1, 2, 3] * 2
    assert measured.visible_frames == [3, 6, 9, 12] * 2


@pytest.mark.parametrize(
    ("workload", "field"),
    [(Workload(window_frames=11, sink_frames=9), "window"), (Workload(size=FrameSize(70, 64)), "size")],
)
def test_an_impossible_workload_is_refused(pipeline, workload, field):
    """A window without room for a chunk and a size that is no multiple of 16 are refused before anything runs."""
    with pytest.raises(ConfigError, match=f"--{field} "):
        run_chunks(pipeline, workload, lambda: None)


def test_time_at_the_roofline():
    """1 TFLOP of linears at 2 TFLOP/s and 3 of attention at 6 take half a second each."""
    assert Roofline(linears=2, attention=6).seconds(Flops(1e12, 2e12, 1e12)) == pytest.approx(1.0)


def test_profile_is_a_chrome_trace(pipeline, tmp_path, capfd):
    """The trace is JSON and has the kernels of a chunk."""
    profile_chunk(pipeline, Workload(size=SMALL, warm=1), str(tmp_path / "trace.json"))
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"aten::linear", "aten::scaled_dot_product_attention"} <= names


def test_command_line(golden, tmp_path, capsys):
    """One command prints the table, writes the figures with their setting, and draws the chart."""
    figures, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    line = (
        f"bench pipeline --model {golden('e2e/model')} --random-weights --device cpu --size 64x64 --window 9 --sink 3"
    )
    assert main([*line.split(), "--steps", "2", "--chunks", "2", "--json", str(figures), "--plot", str(chart)]) == 0
    written = json.loads(figures.read_text())
    assert written["setting"]["steps"] == 2
    assert (written["setting"]["warm_chunks"], written["setting"]["chunks"]) == (6, 2)
    assert written["setting"]["weights"] == "random"
    assert list(written["stages_ms"]) == STAGES
    assert written["stages_ms"]["total"]["count"] == 2
    assert written["tflop"]["DiT"] == pytest.approx(written["tflop"]["denoise"] + written["tflop"]["context"])
    assert written["roofline_share"] == pytest.approx(written["roofline_ms"] / written["stages_ms"]["DiT"]["mean"])
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in STAGES)
    with Image.open(chart) as picture:
        assert picture.size[0] == 960
        assert len(picture.getcolors(10**6)) > 10


def test_fp8(golden, tmp_path, capsys):
    """--quantization fp8 runs quantized linears, is part of the setting, and has its own roofline."""
    line = f"bench pipeline --model {golden('e2e/model')} --random-weights --device cpu --size 64x64 --quantization fp8"
    assert main([*line.split(), "--warm", "0", "--chunks", "1", "--json", str(tmp_path / "fp8.json")]) == 0
    written = json.loads((tmp_path / "fp8.json").read_text())
    assert written["setting"]["quantization"] == "fp8"
    assert written["roofline_tflop_per_s"]["linears"] > 0
    assert "quantization fp8" in capsys.readouterr().out


def test_the_ci_case(golden, tmp_path, capsys):
    """--case sglang-ci sets window 18 and sink 9 and measures chunks 0 to 3. --warm beside it is refused."""
    figures = tmp_path / "ci.json"
    line = f"bench pipeline --model {golden('e2e/model')} --random-weights --device cpu --size 64x64 --case sglang-ci"
    assert main([*line.split(), "--chunks", "4", "--json", str(figures)]) == 0
    setting = json.loads(figures.read_text())["setting"]
    assert (setting["window_frames"], setting["sink_frames"]) == (18, 9)
    assert (setting["case"], setting["visible_frames"]) == ("chunks 0 to 3", [3, 12])
    assert main([*line.split(), "--warm", "2"]) == 2


def test_a_session_that_cannot_fit_is_refused(pipeline):
    """A window larger than free memory is refused with the numbers before anything is allocated."""
    with pytest.raises(CapacityError, match="GB is free"):
        run_chunks(pipeline, Workload(size=SMALL, window_frames=10**9), lambda: None)


def test_loaded_weights(golden, capsys):
    """Without --random-weights the folder's own weights are loaded, text encoder included."""
    line = f"bench pipeline --model {golden('e2e/model')} --device cpu --size 64x64 --warm 0 --chunks 1"
    assert main(line.split()) == 0
    assert "loaded weights" in capsys.readouterr().out


def test_shapes_without_weights_are_refused(capsys):
    """``lingbot-world-fast`` has no weights to load. The error says what to add."""
    assert main(["bench", "pipeline", "--device", "cpu"]) == 2
    assert "--random-weights" in capsys.readouterr().err


def test_the_interactive_window(golden, tmp_path, capsys):
    """The whole window, a moving and a resting camera run in turn in one session, each with its own visible frames.
    A window in which nothing differs, and options of single measurements, are refused."""
    figures = tmp_path / "windows.json"
    line = f"bench pipeline --model {golden('e2e/model')} --random-weights --device cpu --size 64x64 --steps 1"
    line += " --sink 3 --interactive-kv-window --chunks 2"
    assert main([*line.split(), "--window", "24", "--json", str(figures)]) == 0
    written = json.loads(figures.read_text())
    assert written["setting"]["visible_frames"] == [9, 24]
    cases = {case["case"]: case for case in written["cases"]}
    assert {name: case["visible_frames"] for name, case in cases.items()} == {
        "whole window": 24,
        "camera moves": 18,
        "camera at rest": 9,
    }
    assert cases["whole window"]["speedup"] == 1
    assert all(case["dit_ms"]["count"] == 2 for case in cases.values())
    assert "camera at rest" in capsys.readouterr().out
    assert main([*line.split(), "--window", "9"]) == 2
    assert "expected more than 9" in capsys.readouterr().err
    assert main([*line.split(), "--window", "24", "--plot", str(tmp_path / "chart.png")]) == 2
