"""What holds the memory of a device, for /metrics."""

from __future__ import annotations

import torch


def allocated_bytes(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def memory_parts(device: torch.device, model_bytes: int) -> dict[str, int]:
    """Bytes of a GPU by part; they add up to all it has. Empty on a CPU, and after an error that stays.

    ``model_bytes``: what was allocated before any session. ``sessions`` is what came since, ``pool`` what torch keeps
    for later, ``other`` the driver's and other programs'. Callable from any thread.
    """
    if device.type != "cuda":
        return {}
    try:
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return {}
    parts = {
        "model": min(model_bytes, allocated),
        "sessions": max(allocated - model_bytes, 0),
        "pool": reserved - allocated,
        "free": free,
    }
    return parts | {"other": max(total - sum(parts.values()), 0)}
