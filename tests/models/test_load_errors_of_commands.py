"""Every command that loads a model ends with exit code 2 and one line when it does not load."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lingbot_rt.cli import main
from lingbot_rt.models import folder_weights
from tests.preloaded import PreloadedProcess

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

CASES = Path(__file__).parents[2] / "configs" / "regression" / "builtin.toml"


@pytest.fixture
def root_logging():
    """Commands configure the root logger. Gives it back as it was."""
    logger = logging.getLogger()
    kept = (logger.level, list(logger.handlers))
    yield
    logger.setLevel(kept[0])
    logger.handlers[:] = kept[1]


@pytest.fixture
def commands(tmp_path):
    """verb -> its command line without the model."""
    cpu = ["--device", "cpu"]
    return {
        "generate": ["generate", "--chunks", "1", "--size", "64x64", "--out", str(tmp_path / "got"), *cpu],
        "bench": ["bench", "pipeline", "--size", "64x64", *cpu],
        "check": ["check", "record", "--out", str(tmp_path / "gt"), str(CASES), "--only", "neutral", *cpu],
    }


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert "Traceback" not in text
    assert "generate loop" not in text
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("verb", ["generate", "bench", "check"])
@pytest.mark.parametrize("damage", ["no-shift", "pointer", "no-mmap"])
def test_commands(model, commands, verb, damage, monkeypatch, capsys, root_logging):
    """generate, bench and check: one line with the file, exit code 2."""
    if damage == "no-shift":
        path = model / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"shift": None}))
    else:
        path = model / WEIGHTS
    if damage == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    if damage == "no-mmap":

        def refuse(path, framework):
            raise OSError("No such device (os error 19)")

        monkeypatch.setattr(folder_weights, "safe_open", refuse)
    option = "--model" if verb == "bench" else "--model-path"
    assert main([*commands[verb], option, str(model)]) == 2
    line = one_line(capsys.readouterr().err)
    assert str(path) in line
    assert {"no-shift": "shift is null", "pointer": "git lfs pull", "no-mmap": "No such device"}[damage] in line


def test_serve(model, tmp_path):
    """serve, in a process of its own: the log names the file, the last line too, and the exit code is 2."""
    (model / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    command = [sys.executable, "-m", "lingbot_rt", "serve", "--port", "0", "--device", "cpu", "--warmup", "false"]
    log = tmp_path / "log"
    assert PreloadedProcess([*command, "--model-path", str(model)], log=log).wait() == 2
    text = log.read_text()
    assert str(model / WEIGHTS) in text
    assert "git lfs pull" in text
    assert "Traceback" not in text


def test_a_wrong_path_is_told_before_torch_is_imported(tmp_path):
    """Importing torch takes seconds. What is wrong is told without it, and what is right says that it goes on."""
    script = f"""
import sys
from lingbot_rt.cli import main
from lingbot_rt.commands.local_engine import require_folders
from lingbot_rt.config import ServeConfig
print(main(["serve", "--port", "0", "--model-path", {str(tmp_path)!r}]), main(["generate", "--model-path", "./no"]))
require_folders(ServeConfig())
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "2 2\nFalse\n"
    wrong_folder, no_folder, starting = done.stderr.splitlines()
    assert "is not a diffusers model folder" in wrong_folder
    assert "there is no such folder" in no_folder
    assert "starting" in starting
