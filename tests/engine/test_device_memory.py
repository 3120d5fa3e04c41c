"""What holds the memory of a device."""

from __future__ import annotations

import torch

from lingbot_rt.engine.device_memory import allocated_bytes, memory_parts


def test_the_parts_of_a_gpu_add_up(monkeypatch):
    """Model, sessions, pool, free and the rest are all of the device; a broken device has no parts, a CPU neither."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 58)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    assert allocated_bytes(device) == 50
    parts = memory_parts(device, 40)
    assert parts == {"model": 40, "sessions": 10, "pool": 8, "free": 30, "other": 12}
    assert sum(parts.values()) == 100
    assert memory_parts(device, 60)["sessions"] == 0  # freed since

    def broken(device):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert memory_parts(device, 40) == {}
    assert memory_parts(torch.device("cpu"), 40) == {}
