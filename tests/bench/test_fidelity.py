"""``bench fidelity`` at tiny size on a CPU: real sessions of real variants, beside the exact one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from lingbot_rt.bench import fidelity
from lingbot_rt.bench.fidelity import Row, psnr_db, relative_rms
from lingbot_rt.cli import main
from lingbot_rt.commands.bench_options import VARIED_OPTIONS


@pytest.fixture
def model(golden, tmp_path) -> str:
    """The golden model with a default size that is soon played."""
    folder = shutil.copytree(golden("e2e/model"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"default_size": "64x64"}))
    return str(folder)


def test_command_line(model, tmp_path, capsys, monkeypatch):
    """The exact session repeats bit for bit, fp8 linears and an fp8 window differ a little in every chunk, and a
    variant that cannot run says why and makes the command fail."""
    variants = {name: fidelity.VARIANTS[name] for name in ("exact", "fp8 linears", "fp8 window")}
    variants |= {"broken": {"vae_dtype": "float99"}}
    monkeypatch.setattr(fidelity, "VARIANTS", variants)
    line = f"bench fidelity --model {model} --frames-model {model} --device cpu --window 6 --steps 1 --chunks 2"
    assert main([*line.split(), "--json", str(tmp_path / "report.json")]) == 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["size"], written["window_frames"], written["steps"], written["chunks"]) == ("64x64", 6, 1, 2)
    exact, fp8, window, broken = written["rows"]
    assert (exact["latent_error"], exact["psnr_db"]) == ([0.0] * 2, [None] * 2)
    assert all(1e-3 < error < 0.06 for error in fp8["latent_error"])
    assert all(25 < psnr < 60 for psnr in fp8["psnr_db"])
    assert all(1e-4 < error < 0.06 for error in window["latent_error"])
    assert "float99" in broken["note"]
    printed = capsys.readouterr().out
    assert "identical" in printed
    assert f"{100 * max(fp8['latent_error']):.3f} %" in printed


def test_variants_are_options_of_serve():
    """All of them together are the last one, and the exact one has none."""
    *single, together = fidelity.VARIANTS.values()
    assert together == {name: value for options in single for name, value in options.items()}
    assert single[0] == {}
    assert sorted(together) == sorted(VARIED_OPTIONS)


@pytest.mark.parametrize("kind", ["fidelity", "targets"])
@pytest.mark.parametrize("option", ["--quantization fp8", "--kv-cache-dtype fp8", "--vae-dtype bfloat16"])
def test_what_the_cases_set_is_no_option(kind, option, capsys):
    """It would be accepted and change nothing."""
    with pytest.raises(SystemExit):
        main(["bench", kind, "--model", "builtin", *option.split()])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_figures():
    """Errors are relative to the exact values; whether they grow is seen from the first and last third."""
    assert relative_rms(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(frames, frames) is None
    assert psnr_db(frames + np.uint8(1), frames) == pytest.approx(48.13, abs=0.01)
    assert Row("x", [0.1, 0.1, 0.2, 0.2, 0.3, 0.5]).growth == pytest.approx(4)
    assert Row("x", [0.0, 0.0]).growth is None
