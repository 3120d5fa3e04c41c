"""Tensors between the host and a device, through page-locked memory: only then does no thread wait for a copy."""

from __future__ import annotations

import logging
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, without waiting for a GPU."""
    if device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the host. From a GPU it is a contiguous copy, complete once the stream has come so far."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class HostPlace:
    """Where a large tensor is while it is off its GPU. The memory stays: locking it takes longer than a copy."""

    def __init__(self) -> None:
        self._host: Tensor | None = None

    def missing_bytes(self, tensor: Tensor) -> int:
        """Host memory that is still to be taken before the tensor can leave its GPU."""
        return tensor.nbytes if tensor.is_cuda and not self._fits(tensor) else 0

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on ``device``, and complete once the stream has come so far."""
        if device.type != "cpu" or not tensor.is_cuda:
            return tensor.to(device, non_blocking=True)
        if not self._fits(tensor) or self._host is None:
            self._host = None  # freed before the next one is made
            self._host = locked_like(tensor)
        return self._host.copy_(tensor, non_blocking=True)

    def _fits(self, tensor: Tensor) -> bool:
        host, dense = self._host, torch.empty_like(tensor, device="meta")
        # Strides too: they choose the kernels of later convolutions, and so their rounding.
        return host is not None and (host.shape, host.stride(), host.dtype) == (
            dense.shape,
            dense.stride(),
            dense.dtype,
        )


def locked_like(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape and strides in page-locked host memory; in plain memory where no more can be locked.

    torch's own would be rounded up to a power of two, and one thread would make all pages: 16 s for the 23 GB that the
    window of the 14B has.
    """
    buffer = mmap.mmap(-1, max(tensor.nbytes, 1))
    with suppress(AttributeError, OSError):  # not everywhere
        buffer.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(buffer, dtype=torch.uint8).zero_()  # all threads make the pages
    if torch.cuda.is_available():
        runtime, address = torch.cuda.cudart(), everything.data_ptr()
        if int(runtime.cudaHostRegister(address, len(buffer), 0)) == 0:
            # The tensor holds the buffer. At exit CUDA may be gone before it.
            weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
        else:
            log.warning("%.1f GB of host memory cannot be locked: copies to and from it are slow", len(buffer) / 1e9)
    dense = torch.empty_like(tensor, device="meta")
    return everything[: tensor.nbytes].view(tensor.dtype).as_strided(dense.shape, dense.stride())
