"""Where a network's weights are: on its device for good, or on the host while it does not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Movable(Protocol):
    def to(self, device: torch.device) -> object: ...


class Placement:
    """A network on its device, or with ``offload`` on the CPU outside of ``on_device``."""

    def __init__(self, network: Movable, device: torch.device, *, offload: bool) -> None:
        self._network = network
        self._device = device
        self._offload = offload and device.type != "cpu"
        network.to(torch.device("cpu") if self._offload else device)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The network may run inside. An offloaded one is moved to the device and back."""
        if not self._offload:
            yield
            return
        self._network.to(self._device)
        try:
            yield
        finally:
            # The move back runs on the current stream. Work on other streams must be done with the weights first.
            torch.cuda.synchronize(self._device)
            self._network.to(torch.device("cpu"))


_ALIGNMENT = 256  # bytes; kernels read at least 16 at a time


class StreamedBlocks(nn.ModuleList):
    """A DiT's blocks with their weights in host memory. While one block runs, the next one is copied to the device.

    It replaces ``CausalDiT.blocks`` and can only be iterated over in order: a block's weights are valid until the next
    block is taken. The device holds two blocks in two fixed buffers. After the last block the first one is copied, for
    the next forward.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Moves the blocks one by one, so that host memory never holds two copies of more than one block."""
        super().__init__()
        self._device = device
        on_gpu = device.type == "cuda"
        self._host = []
        for block in blocks:
            self._host.append(_pack(block, pin=on_gpu))
        self._slots = [torch.empty_like(self._host[0], device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        for i, block in enumerate(blocks):
            _bind(block, self._slots[i % 2])
            self.append(block)
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        # One event per buffer. On a CPU copies and computation take turns anyway.
        self._copied = [torch.cuda.Event() for _ in self._slots] if on_gpu else []
        self._used = [torch.cuda.Event() for _ in self._slots] if on_gpu else []

    @property
    def resident(self) -> tuple[int | None, ...]:
        """The block that each buffer on the device holds, or will hold when its copy is done."""
        return tuple(self._held)

    @property
    def bytes_per_forward(self) -> int:
        """Bytes copied to the device in each forward."""
        return sum(packed.nbytes for packed in self._host)

    def __iter__(self) -> Iterator[nn.Module]:
        count = len(self)
        for i in range(count):
            self._await(i)
            following = (i + 1) % count
            # After the last of an odd number of blocks, the first one needs the same buffer and has to wait for it.
            if following % 2 != i % 2:
                self._fetch(following)
            try:
                yield self[i]
            finally:
                self._release(i)

    def _fetch(self, i: int) -> None:
        """Starts the copy of block ``i``, once the block that used its buffer has run."""
        slot = i % 2
        if self._held[slot] == i:
            return
        if self._copies is None:
            self._slots[slot].copy_(self._host[i])
        else:
            self._copies.wait_event(self._used[slot])
            with torch.cuda.stream(self._copies):
                self._slots[slot].copy_(self._host[i], non_blocking=True)
                self._copied[slot].record()
        self._held[slot] = i

    def _await(self, i: int) -> None:
        self._fetch(i)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied[i % 2])

    def _release(self, i: int) -> None:
        if self._copies is not None:
            self._used[i % 2].record(torch.cuda.current_stream(self._device))


def _layout(block: nn.Module) -> list[tuple[nn.Module, str, Tensor, int]]:
    """(owner, name, tensor, first byte in the packed block) of every parameter and buffer of a block."""
    found, first = [], 0
    for owner in block.modules():
        named: dict[str, Any] = {**owner._parameters, **owner._buffers}
        for name, tensor in named.items():
            if tensor is not None:
                found.append((owner, name, tensor, first))
                first += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return found


def _pack(block: nn.Module, *, pin: bool) -> Tensor:
    """The block's weights as bytes on the host. The block's own tensors move to the meta device."""
    layout = _layout(block)
    *_, last, first = layout[-1]
    size = first + -(-last.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for owner, name, tensor, first in layout:
        packed[first : first + tensor.nbytes].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        _set(owner, name, tensor.detach().to("meta"))
    return packed


def _bind(block: nn.Module, slot: Tensor) -> None:
    """Makes the block's parameters and buffers views of ``slot``."""
    for owner, name, tensor, first in _layout(block):
        view = slot[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        _set(owner, name, view)


def _set(owner: nn.Module, name: str, tensor: Tensor) -> None:
    is_parameter = name in owner._parameters
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
