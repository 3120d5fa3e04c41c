"""Host memory for tensors that leave their GPU. What a GPU does with it is tested in tests/gpu."""

from __future__ import annotations

import gc

import pytest
import torch

from lingbot_rt.models.transfer import HostPlace, locked_like, to_host


class Runtime:
    """CUDA's, as far as it locks memory."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.error:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]


@pytest.fixture
def runtime(monkeypatch, request):
    runtime = Runtime(getattr(request, "param", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 3, 5, dtype=torch.bfloat16),
        torch.empty(2, 4, 6, 8).to(memory_format=torch.channels_last),
        torch.empty(4, 10)[:, ::2],
        torch.empty(3, 7, dtype=torch.float8_e4m3fn),
        torch.empty(0, 4),
    ],
    ids=["plain", "channels last", "with gaps", "fp8", "empty"],
)
def test_locked_memory_is_like_the_tensor(runtime, tensor):
    """Shape, format and the order of a dense copy; locked for as long as anything of it is in use."""
    host = locked_like(tensor)
    assert (host.shape, host.dtype, host.stride()) == (tensor.shape, tensor.dtype, tensor.clone().stride())
    assert not host.float().any()
    assert list(runtime.locked.values()) == [max(tensor.nbytes, 1)]
    part = host[:1]
    del host
    gc.collect()
    assert len(runtime.locked) == 1
    del part
    gc.collect()
    assert not runtime.locked


@pytest.mark.parametrize("runtime", [2], indirect=True)
def test_memory_that_cannot_be_locked_is_used_unlocked(runtime, caplog):
    """With one line of the log: copies are slow then, and nothing is lost."""
    assert locked_like(torch.empty(2, 3)).shape == (2, 3)
    assert "0.0 GB of host memory cannot be locked" in caplog.text
    assert not runtime.locked


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.rand(2, 3)
    assert to_host(tensor) is tensor
    assert HostPlace().move(tensor, torch.device("cpu")) is tensor
