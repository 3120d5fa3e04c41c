"""Measurements on several real processes over gloo, at tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from textwrap import dedent

import pytest

from lingbot_rt.bench import apart, pipeline_report
from lingbot_rt.bench.scaling import Measured, computed_ms
from lingbot_rt.cli import main
from lingbot_rt.commands import bench
from lingbot_rt.errors import ConfigError, EngineFailed
from tests.parallel.test_serve import is_alive

pytestmark = pytest.mark.usefixtures("preloaded_workers")

SMALL = "--model builtin --device cpu --size 80x80 --steps 2"


def test_strong_scaling_in_one_call(tmp_path, capsys):
    """One and two ranks are measured in turn. The table's speedup and efficiency follow from their medians."""
    figures = tmp_path / "scaling.json"
    line = f"bench pipeline {SMALL} --random-weights --window 9 --sink 3 --warm 1 --chunks 2 --num-gpus 1,2"
    assert main([*line.split(), "--vae-parallel", "width", "--json", str(figures)]) == 0
    written = json.loads(figures.read_text())
    alone, pair = written["reports"]
    assert [report["setting"]["ranks"] for report in written["reports"]] == [1, 2]
    assert [report["setting"]["vae_parallel"] for report in written["reports"]] == ["none", "width"]
    assert "exchange" not in alone["stages_ms"]
    assert 0 < pair["stages_ms"]["exchange"]["p50"] < pair["stages_ms"]["total"]["p50"]
    first, second = written["scaling"]
    assert (first["dit_speedup"], first["efficiency"], first["exchange_share"]) == (1, 1, 0)
    speedup = alone["stages_ms"]["DiT"]["p50"] / pair["stages_ms"]["DiT"]["p50"]
    assert second["dit_speedup"] == pytest.approx(speedup)
    assert second["efficiency"] == pytest.approx(speedup / 2)
    share = pair["stages_ms"]["exchange"]["p50"] / pair["stages_ms"]["total"]["p50"]
    assert second["exchange_share"] == pytest.approx(share)
    assert sorted(written["computed_ms"]) == ["4", "8"]
    printed = capsys.readouterr().out
    assert "computed from 1 and 2 ranks, total: " in printed
    assert "2 ranks (through collectives, VAE parallel: width)" in printed
    assert "efficiency" in printed


@pytest.mark.parametrize(("counts", "is_apart"), [("1,2", False), ("2,4", True), ("1,2,4", True)])
def test_several_ranks_twice_are_measured_apart(counts, is_apart, monkeypatch):
    """GPUs connect the ranks of a process once, so that then each count has a process of its own."""
    measured = []

    def measure(where, job, *args):
        measured.append((where, job.config.num_gpus))
        if len(measured) == counts.count(",") + 1:
            raise EngineFailed("enough")

    monkeypatch.setattr(bench, "_measure", partial(measure, "here"))
    monkeypatch.setattr(apart, "in_a_process", lambda function, *args: measure("apart", *args))
    monkeypatch.setattr(bench, "say", lambda text: None)
    monkeypatch.setattr(pipeline_report, "as_text", str)
    assert main(f"bench pipeline {SMALL} --random-weights --num-gpus {counts}".split()) == 1
    assert measured == [("apart" if is_apart else "here", int(count)) for count in counts.split(",")]


class Deadly:
    """Ends the process that reads it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_apart():
    """Its result, its error or its end comes back."""
    assert apart.in_a_process(divmod, 7, 2) == (3, 1)
    with pytest.raises(ConfigError, match="names no model") as caught:
        apart.in_a_process(fail, "names no model")
    assert caught.value.field == "model"
    with pytest.raises(EngineFailed, match="has died"):
        apart.in_a_process(len, Deadly())


def fail(text: str) -> None:
    raise ConfigError(text, field="model")


def test_a_process_apart_ends_with_its_parent(tmp_path):
    """Also when the parent is killed and can say nothing."""
    code = f"""
        import os, time
        from pathlib import Path
        from lingbot_rt.bench.apart import in_a_process

        def work(path):
            Path(path).write_text(str(os.getpid()))
            time.sleep(600)

        if __name__ == "__main__":
            in_a_process(work, {str(tmp_path / "pid")!r})
    """
    script = tmp_path / "parent.py"
    script.write_text(dedent(code))
    parent = subprocess.Popen([sys.executable, script])
    try:
        pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        assert is_alive(pid)
    finally:
        parent.kill()
        parent.wait()
    eventually(lambda: not is_alive(pid))


def eventually(found):
    """The first true result of ``found()``, within a minute."""
    limit = time.monotonic() + 60
    while not (result := found()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return result


def test_more_ranks_are_computed_from_the_parts():
    """1000 ms of which 800 split and 200 do not; collectives of 40 on two ranks move 3/4 as much on four and 7/16 as
    much on eight. The two measured ones come out as they were."""
    alone, pair = Measured(1, 1000, 0), Measured(2, 400 + 200 + 40, 40)
    assert [computed_ms(alone, pair, count) for count in (1, 2, 4, 8)] == pytest.approx(
        [1000, 640, 200 + 200 + 30, 100 + 200 + 17.5]
    )
    # More than twice as fast without the collectives: everything is split.
    assert computed_ms(alone, Measured(2, 480, 0), 4) == pytest.approx(260)


def test_collectives(tmp_path, capsys):
    """Time, bytes and number of each collective of a chunk: 75 tokens of 4 heads of 64 in 12 layers on two ranks.

    With a window in fp8, q, k and v cross as bytes.
    """
    figures = tmp_path / "collectives.json"
    line = f"bench collectives {SMALL} --kv-cache-dtype fp8 --num-gpus 2 --repeats 2 --chunk-ms 1000 --json {figures}"
    assert main(line.split()) == 0
    written = json.loads(figures.read_text())
    packed, attended, flow, pixels = written["exchanges"]
    # Rank 0 has 38 of the tokens and half of the heads; the rest is in float32.
    assert packed["moved_mb"] == pytest.approx(38 * 3 * 2 * 64 / 1e6)
    assert attended["moved_mb"] == pytest.approx(38 * 2 * 64 * 4 / 1e6)
    assert flow["moved_mb"] == pytest.approx(38 * 41 * 4 * 4 / 1e6)
    assert [one["calls"] for one in written["exchanges"]] == [12 * 3, 12 * 3 - 1, 2, 3]
    # Half of the four pixel frames of a latent frame, float32.
    assert pixels["moved_mb"] == pytest.approx(40 * 80 * 3 * 4 * 4 / 1e6)
    assert all(one["ms"] > 0 for one in written["exchanges"])
    assert written["total_ms"] == pytest.approx(sum(one["ms"] * one["calls"] for one in written["exchanges"]))
    assert f"{written['total_ms'] / 10:.1f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bench collectives --num-gpus 1", "--num-gpus 1 has nothing to exchange"),
        (f"bench collectives {SMALL} --num-gpus 3", "--num-gpus 3 does not divide the 4 heads of builtin"),
        ("bench pipeline --random-weights --num-gpus 1,2 --plot x.png", "name one --num-gpus"),
        ("bench pipeline --random-weights --device cpu --num-gpus 7", "does not divide the 40 heads"),
        (f"bench pipeline {SMALL} --random-weights --num-gpus 1,3", "--num-gpus 3 does not divide the 4 heads"),
    ],
)
def test_an_impossible_measurement_is_one_line(line, expected, capsys):
    """It is refused with exit code 2 before any process starts."""
    assert main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert expected in error
