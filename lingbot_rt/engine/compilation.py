"""Whether torch.compile is used, and where compiled code is cached."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from lingbot_rt.errors import ConfigError

log = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang", "g++", "c++", "clang++")


def resolve_compile(name: str, device: torch.device) -> bool:
    """The value of ``--compile`` (auto, true, false) -> whether to compile.

    ``auto`` compiles on a GPU when compiler, headers and triton are installed. It does not compile on a CPU: the code
    saves a seventh of the chunk time there, but a start takes a minute longer. Raises ConfigError for ``true`` when
    something is missing.
    """
    if name == "false" or (name == "auto" and device.type != "cuda"):
        return False
    missing = _missing_requirement(device)
    if missing and name == "true":
        raise ConfigError(f"--compile true needs {missing}, which is not installed: install it or use --compile false")
    if missing:
        log.warning("not compiled, so chunks take longer: torch.compile needs %s, which is not installed", missing)
    return not missing


def _missing_requirement(device: torch.device) -> str:
    """What torch.compile needs and is not installed; empty when nothing is missing."""
    if not any(map(shutil.which, (*filter(None, (os.environ.get("CC"), os.environ.get("CXX"))), *_COMPILERS))):
        return "a C++ compiler"
    # Code of inductor and triton is built against them. Without this check the first kernel would fail.
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Python's headers (Python.h)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return ""


def set_compile_cache(folder: str | None) -> None:
    """Makes ``folder`` the cache of compiled code, unless None. Raises ConfigError when it cannot be created."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--compile-cache {folder}: {error.strerror}", field="compile_cache") from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Convolutions of new shapes inside try cuDNN's kernels and keep the fastest, also after this. For warm-ups."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_compiling: dict[int, float] = {}  # thread: since when


def compilations(limit_s: float = math.inf) -> object:
    """A value that changes while torch.compile is at work, for ``limit_s`` at most, and stays the same otherwise."""
    _observe_compilation()
    now = time.monotonic()
    return now if any(now - since < limit_s for since in list(_compiling.values())) else None


@cache
def _observe_compilation() -> None:
    handler = importlib.import_module("torch._dynamo.callback").callback_handler
    handler.register_start_callback(lambda *args: _compiling.setdefault(threading.get_ident(), time.monotonic()))
    handler.register_end_callback(lambda *args: _compiling.pop(threading.get_ident(), None))
