"""``scripts/install``: which torch it asks for. Python and nvidia-smi are scripts that note their calls."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_TORCH = "torch==2.13.0+cpu"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no CUDA build of torch on PyPI")


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def installed(folder: Path, *, gpu: bool, fails: str = "nothing") -> tuple[list[str], str]:
    """The pip commands of an install, and what it says. Those in which the shell pattern ``fails`` occurs fail."""
    for name in ("scripts/install", "scripts/constraints.txt", "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    script(folder / ".venv/bin/python", f'echo "$*" >> calls\ncase "$*" in {fails}) exit 1;; esac')
    script(folder / "tools/nvidia-smi", "exit 0" if gpu else "exit 9")
    done = subprocess.run(
        [folder / "scripts/install"],
        env={"PATH": f"{folder / 'tools'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    upgrade, *torch, package = (folder / "calls").read_text().splitlines()
    assert "pip>=25.1" in upgrade
    assert package == "-m pip install --constraint scripts/constraints.txt --editable .[video,fast]"
    assert len(list((folder / ".venv").glob("installed-run-*"))) == 1
    return torch, done.stderr


def test_with_a_gpu_torch_is_the_registrys(tmp_path):
    """Nothing is asked for before the package."""
    assert installed(tmp_path, gpu=True) == ([], "")


def test_without_a_gpu_the_registry_is_asked_first(tmp_path):
    """A registry that has CPU wheels is enough."""
    assert installed(tmp_path, gpu=False) == ([f"-m pip install {CPU_TORCH}"], "")


def test_without_a_gpu_torchs_own_index_is_asked_next(tmp_path):
    """Only torch itself comes from there."""
    (first, second), said = installed(tmp_path, gpu=False, fails=f'"-m pip install {CPU_TORCH}"')
    assert first.endswith(CPU_TORCH)
    assert f"--no-deps --retries 1 --timeout 15 --index-url {CPU_INDEX} {CPU_TORCH}" in second
    assert said == ""


def test_an_index_out_of_reach_breaks_no_install(tmp_path):
    """One line says so, and the package is installed with the torch that there is."""
    torch, said = installed(tmp_path, gpu=False, fails=f"*{CPU_TORCH}")
    assert len(torch) == 2
    assert len(said.splitlines()) == 1
    assert "CUDA" in said
