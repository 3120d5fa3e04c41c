"""For all tests: the path of golden data, one torch thread per process, and no deadlines in hypothesis."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A busy machine may be slow.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

GOLDEN = Path(__file__).parent / "golden"

SLOW = ("parallel", "engine", "regression", "world", "e2e", "bench", "browser", "commands", "models")
"""Folders whose files take longest. They come first, so that two processes end at about the same time."""


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
