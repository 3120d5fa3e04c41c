"""Which device and which number formats a configuration asks for."""

from __future__ import annotations

import os

import torch

from lingbot_rt.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda when there is a CUDA device, else cpu. Raises ConfigError for ``cuda`` without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu", field="device")
    if name != "cuda":
        return torch.device(name)
    # Read at the first allocation. Sessions of many sizes would leave gaps in segments of fixed size.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return torch.device(name, torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def resolve_kv_cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The attention window's format: ``auto`` is ``dtype``, that of the networks."""
    return {"auto": dtype, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[name]


def describe_device(device: torch.device) -> str:
    """``cuda: NVIDIA H100 80GB HBM3`` or ``cpu: 2 threads``."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {torch.get_num_threads()} threads"
