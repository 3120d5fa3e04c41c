"""For all tests: the path of golden data, one torch thread per process, fixed seeds, and no deadlines in hypothesis.

``pytest -m gpu`` collects tests/gpu alone, and needs neither pytest-asyncio nor pytest-timeout: a machine with an
accelerator may not have all that the other tests import.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A busy machine may be slow, and a run is the same as the one before: scripts/fuzz.py tries other inputs.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

GOLDEN = Path(__file__).parent / "golden"

SLOW = ("parallel", "engine", "regression", "world", "e2e", "bench", "browser", "commands", "models")
"""Folders whose files take longest. They come first, so that two processes end at about the same time."""


GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_addoption(parser, pluginmanager):
    """Makes known what pyproject.toml sets for plugins that are not there."""
    for plugin, setting in (("asyncio", "asyncio_mode"), ("timeout", "timeout")):
        if not pluginmanager.has_plugin(plugin):
            parser.addini(setting, f"not in use: pytest-{plugin} is not installed")


def pytest_ignore_collect(collection_path, config):
    """With ``-m gpu`` nothing else is imported."""
    is_within = collection_path == GPU_TESTS.parent or collection_path.is_relative_to(GPU_TESTS)
    if config.option.markexpr == "gpu" and collection_path.is_relative_to(GPU_TESTS.parent) and not is_within:
        return True
    return None


def pytest_collection_modifyitems(items):
    """Slow folders come first. ``gpu`` tests are skipped without an accelerator; ``-m gpu`` runs them alone."""
    items.sort(key=lambda item: SLOW.index(item.path.parent.name) if item.path.parent.name in SLOW else len(SLOW))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no accelerator"))


def pytest_fixture_setup(fixturedef):
    seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed(item.nodeid)


def seed(name):
    """Random numbers that a test draws depend on its name alone, and not on the tests before it."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    for module in ("numpy", "torch"):
        if module in sys.modules:
            library = sys.modules[module]
            library.random.seed(number) if module == "numpy" else library.manual_seed(number)


@pytest.fixture(scope="session")
def golden():
    """``golden("dit/config.json")`` -> the path of a golden file."""

    def path(relative: str) -> Path:
        found = GOLDEN / relative
        assert found.exists(), f"tests/golden/{relative} is missing"
        return found

    return path


@pytest.fixture
def preloaded_workers(monkeypatch):
    """The processes of the other ranks are forks of one that has imported everything."""
    from lingbot_rt.parallel import launch
    from tests.preloaded import PreloadedProcess

    def start(command, *, env, stdin):
        return PreloadedProcess(command, env=env)

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=start, **names))
