"""``bench targets`` at tiny size on a CPU: every case, every figure, and a case that fails."""

from __future__ import annotations

import json

import pytest

from lingbot_rt.bench import targets
from lingbot_rt.bench.figures import Spread
from lingbot_rt.bench.targets import TARGETS_MS, Row, TargetsReport, as_text
from lingbot_rt.cli import main


@pytest.fixture
def line(golden) -> str:
    return f"bench targets --model {golden('e2e/model')} --device cpu --size 64x64 --window 12 --sink 3 --chunks 2"


CASES = [
    "float32 not compiled",
    "chunks 0 to 3",
    "chunk 2000 beside chunk 6",
    "fp8 linears and window, not compiled",
    "VAE alone, float32 not compiled",
    "VAE alone, bfloat16 not compiled",
]


def test_one_command(line, tmp_path, capsys):
    """All cases run, in order, and the table and the file have their figures."""
    assert main([*line.split(), "--json", str(tmp_path / "targets.json")]) == 0
    written = json.loads((tmp_path / "targets.json").read_text())
    assert list(dict.fromkeys(row["case"] for row in written["rows"])) == CASES
    assert {row["figure"] for row in written["rows"] if row["case"] == "fp8 linears and window, not compiled"} == {
        "DiT",
        "VAE",
        "after denoise",
        "total",
    }
    assert all(row["value"]["p50"] > 0 and not row["error"] for row in written["rows"])
    assert all(row["required"] is None for row in written["rows"])  # only the 14B has targets
    printed = capsys.readouterr().out
    assert all(case in printed for case in CASES)
    assert "far / near" in printed


def test_a_case_that_fails_is_reported_and_the_next_one_runs(line, tmp_path, capsys, monkeypatch):
    """The failing case's row has the error, the others have their figures, and the exit code is 1."""

    def broken():
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(targets, "_cases", lambda *args: iter([("first", broken), ("second", lambda: {"VAE": [2.0]})]))
    assert main([*line.split(), "--json", str(tmp_path / "targets.json")]) == 1
    rows = json.loads((tmp_path / "targets.json").read_text())["rows"]
    assert [(row["case"], row["error"]) for row in rows] == [("first", "RuntimeError: no kernel"), ("second", "")]
    assert rows[1]["value"]["p50"] == 2.0
    assert "RuntimeError: no kernel" in capsys.readouterr().out


def test_verdicts():
    """A figure meets the desired target, only the required one, or neither."""
    spread = [Spread(ms, ms, ms, ms, 1) for ms in (1700.0, 1800.0, 2100.0)]
    required, desired = TARGETS_MS["bfloat16 compiled", "DiT"]
    rows = [Row("bfloat16 compiled", "DiT", value, required, desired) for value in spread]
    text = as_text(TargetsReport("m", "d", "t", "832x480", 9, 18, 4, 10, rows)).splitlines()
    assert [text[-3 + i].split()[-1] for i in range(3)] == ["desired", "required", "missed"]
