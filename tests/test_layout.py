"""The package layout: which folders may import which, and how long files and parameter lists may be.

A folder is a folder of lingbot_rt; a file at its top (config, errors, ...) counts as a folder of its own.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lingbot_rt"
NAME = PACKAGE.name
TORCH_FREE = ("client", "server", "session", "transport")
ONE_MODEL = {"models/dit.py"}
"""Files that may pass MAX_LINES, because each is one model."""

MAX_LINES = 500
MAX_PARAMETERS = 8
MANY_PARAMETERS = {
    "lingbot_rt.models.kv_cache.KVCache.__init__",  # ten, keyword-only: the shape of the cache
    # Triton kernels: pointers, strides and constants, passed by name in one place each.
    "lingbot_rt.models.fused_kernels._residual_norm",
    "lingbot_rt.models.fused_kernels._project_heads",
    "lingbot_rt.models.fused_kernels._store_rows",
}
"""Functions that may pass MAX_PARAMETERS, each with its reason."""


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.glob("**/*.py"))}
"""Every module of the package by its dotted name."""


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def folder_of(module: str) -> str:
    """``lingbot_rt.engine.dmd`` -> ``engine``; the package's own ``__init__`` is ``lingbot_rt``."""
    return module.removeprefix(f"{NAME}.").partition(".")[0]


def imports_of(module: str) -> Iterator[str]:
    """Every name that the module imports: at its top, inside a function, for type checking, or by ``import_module``."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # The constant beginning of the name: f"lingbot_rt.commands.{verb}" counts as lingbot_rt.commands.
            start = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(start, ast.Constant):
                yield start.value.rstrip(".")


def modules_imported_by(module: str) -> set[str]:
    """The package's own modules among its imports: ``from a.b import c`` counts as a.b.c if that is a module."""
    found = set()
    for name in imports_of(module):
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def folder_imports() -> dict[str, dict[str, str]]:
    """Folder -> folders that it imports -> one import of each, as ``module -> module``."""
    graph: dict[str, dict[str, str]] = {folder_of(module): {} for module in FILES}
    for module in FILES:
        for imported in modules_imported_by(module):
            if folder_of(imported) != folder_of(module):
                graph[folder_of(module)].setdefault(folder_of(imported), f"{module} -> {imported}")
    return graph


def find_cycle(graph: dict[str, dict[str, str]]) -> list[str]:
    """The imports along one cycle, or an empty list."""
    done: set[str] = set()

    def visit(folder: str, path: list[str]) -> list[str]:
        if folder in path:
            loop = [*path[path.index(folder) :], folder]
            return [graph[a][b] for a, b in pairwise(loop)]
        if folder in done:
            return []
        for imported in graph[folder]:
            if cycle := visit(imported, [*path, folder]):
                return cycle
        done.add(folder)
        return []

    return next((cycle for folder in graph if (cycle := visit(folder, []))), [])


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_cycle_between_folders():
    """No folder imports itself by way of others, counting every import of every module."""
    assert find_cycle(folder_imports()) == []


def test_cycles_and_relative_imports_are_found(tmp_path, monkeypatch):
    """The walk finds a cycle that is closed by a relative import inside a function."""
    for module, text in {
        "lingbot_rt.a": "",
        "lingbot_rt.a.one": "import lingbot_rt.b.two",
        "lingbot_rt.b": "",
        "lingbot_rt.b.two": "def f():\n    from ..a import one",
    }.items():
        path = tmp_path / module / ("__init__.py" if module.count(".") == 1 else "module.py")
        path.parent.mkdir()
        path.write_text(text)
        monkeypatch.setitem(FILES, module, path)
    cycle = find_cycle({folder: to for folder, to in folder_imports().items() if folder in ("a", "b")})
    assert sorted(cycle) == ["lingbot_rt.a.one -> lingbot_rt.b.two", "lingbot_rt.b.two -> lingbot_rt.a.one"]


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_torch_free_folders(folder):
    """Importing every module of the folder loads no torch, and no function of the folder imports it."""
    modules = [module for module in FILES if folder_of(module) == folder]
    assert modules
    for module in modules:
        assert "torch" not in {name.partition(".")[0] for name in imports_of(module)}, module
    assert "torch" not in loaded_after("\n".join(f"import {module}" for module in modules))


@pytest.mark.parametrize("module", [module for module in FILES if folder_of(module) == "session"])
def test_session_has_no_socket_thread_loop_or_clock(module):
    """``session/`` gets time as an argument and leaves I/O to others."""
    forbidden = {"socket", "threading", "asyncio", "time", "datetime", "concurrent", "websockets", "fastapi", "torch"}
    assert forbidden.isdisjoint(name.partition(".")[0] for name in imports_of(module))


@pytest.mark.parametrize("module", FILES)
def test_who_may_not_import_whom(module):
    """``models/`` imports no engine, session or server; only the command line imports ``commands/`` and ``cli``."""
    imported = {folder_of(name) for name in modules_imported_by(module)}
    folder = folder_of(module)
    if folder == "models":
        assert imported.isdisjoint({"engine", "session", "server"})
    if folder not in ("cli", "commands"):
        assert "commands" not in imported
    if folder != "__main__":
        assert "cli" not in imported


def test_command_line_starts_without_the_heavy_packages():
    """``lingbot-rt --help`` and ``serve --help`` answer before torch, numpy or the web framework are loaded."""
    loaded = loaded_after("from lingbot_rt.cli import build_parser\nbuild_parser('serve').format_help()")
    assert loaded.isdisjoint({"torch", "numpy", "diffusers", "transformers", "fastapi", "msgspec"})


def test_files_stay_short():
    """No file passes 500 lines unless it is one model."""
    for path in FILES.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES or path.relative_to(PACKAGE).as_posix() in ONE_MODEL, f"{path} has {lines} lines"


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function below ``node``, methods and nested ones too, with its qualified name."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        inner = f"{name}.{child.name}" if is_function or isinstance(child, ast.ClassDef) else name
        if is_function:
            yield inner, child
        yield from functions(child, inner)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [arg.arg for arg in named if arg is not None and arg.arg not in ("self", "cls")]


def test_parameter_lists_stay_short():
    """No function takes more than eight parameters besides self and cls."""
    long = {
        name
        for module in FILES
        for name, function in functions(parse(module), module)
        if len(parameters(function)) > MAX_PARAMETERS
    }
    assert long <= MANY_PARAMETERS


def test_tests_for_an_accelerator_are_in_one_folder():
    """``pytest -m gpu`` looks nowhere else."""
    tests = PACKAGE.parent / "tests"
    marked = {path for path in tests.rglob("*.py") if "pytest.mark." + "gpu" in path.read_text(encoding="utf-8")}
    assert {path.parent for path in marked} == {tests / "gpu"}
