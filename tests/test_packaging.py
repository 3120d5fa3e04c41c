"""The wheel: the package with its page and its model, and one command."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lingbot_rt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("lingbot_rt-*.whl")))


def shipped(folder: str) -> set[str]:
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_page_and_the_model_are_inside(wheel):
    """The wheel has every file of webui/ and lingbot_rt/, with the page inside the package, and nothing else."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == shipped("lingbot_rt") | {f"lingbot_rt/{name}" for name in shipped("webui")}
    assert "lingbot_rt/webui/index.html" in names
    assert "lingbot_rt/builtin/vae/diffusion_pytorch_model.safetensors" in names


def test_name_version_command_and_licence(wheel):
    """The metadata has the package's version and license, and the command is ``lingbot-rt``."""
    info = f"lingbot_rt-{lingbot_rt.__version__}.dist-info"
    assert wheel.read(f"{info}/entry_points.txt").decode().split("\n")[1].split() == [
        "lingbot-rt",
        "=",
        "lingbot_rt.cli:main",
    ]
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


BASH_SCRIPTS = [
    *(ROOT / "scripts" / name for name in ("check_supply", "fetch_models", "install", "lint", "serve", "test")),
    ROOT / ".ci" / "run",
]


@pytest.mark.parametrize("script", BASH_SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_runnable_and_short(script):
    """Each bash script parses, is executable and has at most 20 lines."""
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert len(text.splitlines()) <= 20
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_constraints_pin_torch():
    """The scripts install one exact torch. The package only sets a minimum version."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines
    assert '"torch>=2.9"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
