"""The shipped cases on the built-in model."""

from __future__ import annotations

import json
import shutil

from lingbot_rt.cli import main
from tests.regression.conftest import CASES


def test_the_built_in_model_passes_its_own_ground_truth(tmp_path, capsys):
    """``check record`` and then ``check run`` on every shipped case: bit for bit equal, exit code 0.

    Smaller pictures and fewer steps than shipped, which take a quarter of the time.
    """
    folder, gt = shutil.copytree(CASES, tmp_path / "cases"), str(tmp_path / "gt")
    text = (folder / "builtin.toml").read_text()
    assert text.count('size = "128x80"') == 1
    (folder / "builtin.toml").write_text(text.replace('"128x80"', '"64x64"\nnum_inference_steps = 1'))
    cases = str(folder / "builtin.toml")
    model = ["--device", "cpu", "--dtype", "float32", "--warmup", "false"]
    assert main(["check", "record", cases, "--out", gt, *model]) == 0
    capsys.readouterr()
    assert main(["check", "run", cases, "--gt", gt, "--json", "--no-latency", *model]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert verdicts["passed"]
    assert len(verdicts["cases"]) == 11
    assert all(case["different_frames"] == 0 and case["total_frames"] for case in verdicts["cases"])
