"""Whether compiled code is used, and where it is kept."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from lingbot_rt.errors import ConfigError

log = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang", "g++", "c++", "clang++")


def resolve_compile(name: str, device: torch.device) -> bool:
    """``auto`` is on for cuda, where what it needs is there; on a CPU it gains a seventh of a
    chunk, and a start takes a minute more: for those who ask.

    Raises ConfigError for ``true`` without what it needs.
    """
    if name == "false" or (name == "auto" and device.type != "cuda"):
        return False
    lacks = _lacks(device)
    if lacks and name == "true":
        raise ConfigError(f"--compile true needs {lacks}, which is not here: install it or use --compile false")
    if lacks:
        log.warning("slower than it could be: to compile, this needs %s, which is not here", lacks)
    return not lacks


def _lacks(device: torch.device) -> str:
    """What is missing for torch.compile, or nothing."""
    if not any(map(shutil.which, (*filter(None, (os.environ.get("CC"), os.environ.get("CXX"))), *_COMPILERS))):
        return "a C++ compiler"
    # What inductor and triton generate is built against them; there is no sign of their lack before the first kernel.
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Python's headers (Python.h)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return ""


def keep_compiled_code(folder: str | None) -> None:
    """Later compilations are looked up in ``folder`` and kept there. Raises ConfigError when it cannot be written."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--compile-cache {folder}: {error.strerror}", field="compile_cache") from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())
