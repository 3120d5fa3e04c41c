"""The rules of the house: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lingbot_rt"
TORCH_FREE = ("server", "session", "transport", "client")
ONE_MODEL = {"models/dit.py"}  # a file may pass the limit only when it is one model
MAX_LINES = 500


def modules(*rooms: str) -> list[str]:
    files = [path for room in rooms for path in sorted((PACKAGE / room).glob("**/*.py"))]
    names = [path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".") for path in files]
    return [name.removesuffix(".__init__") for name in names]


def imported_by(path: Path) -> set[str]:
    """Every module named by an import of the file, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("room", TORCH_FREE)
def test_rooms_without_torch(room):
    """Importing every module of the room loads no torch, however indirectly."""
    names = modules(room)
    assert names
    assert "torch" not in loaded_after("\n".join(f"import {name}" for name in names))


def test_command_line_starts_without_the_heavy_packages():
    """``lingbot-rt --help`` and ``serve --help`` answer before torch, numpy or the web framework are needed."""
    loaded = loaded_after("from lingbot_rt.cli import build_parser\nbuild_parser('serve').format_help()")
    assert loaded.isdisjoint({"torch", "numpy", "diffusers", "transformers", "fastapi", "msgspec"})


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("models", "lingbot_rt.engine"), ("models", "lingbot_rt.server"), (".", "lingbot_rt.cli")],
)
def test_who_may_not_import_whom(room, forbidden):
    """``models/`` knows neither engine nor server, and nothing but ``__main__`` knows the command line."""
    for path in (PACKAGE / room).glob("**/*.py"):
        if path != PACKAGE / "__main__.py":
            offending = {name for name in imported_by(path) if name == forbidden or name.startswith(forbidden + ".")}
            assert not offending, f"{path} imports {offending}"


def test_files_stay_short():
    """No file passes 500 lines unless it is one model."""
    for path in PACKAGE.glob("**/*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES or path.relative_to(PACKAGE).as_posix() in ONE_MODEL, f"{path} has {lines} lines"
