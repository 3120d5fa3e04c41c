"""Where a network rests and where it works: on its device for good, or on the CPU between visits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Movable(Protocol):
    def to(self, device: torch.device) -> object: ...


class Placement:
    """``at_work`` brings an offloaded network to its device and takes it back after; a resident one stays put."""

    def __init__(self, network: Movable, device: torch.device, *, offload: bool) -> None:
        self._network = network
        self._device = device
        self._offload = offload and device.type != "cpu"
        network.to(torch.device("cpu") if self._offload else device)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        if not self._offload:
            yield
            return
        self._network.to(self._device)
        try:
            yield
        finally:
            # The move back runs on the current stream; work on other streams must be done with the weights first.
            torch.cuda.synchronize(self._device)
            self._network.to(torch.device("cpu"))


_ALIGNMENT = 256  # bytes; kernels read 16 at a time at least


class StreamedBlocks(nn.ModuleList):
    """A DiT's blocks, resting in host memory: while one works on the device the next one is on its way there.

    It takes the blocks' place as ``CausalDiT.blocks``. Going through it in order is the only use: a block's weights
    are its own from the moment it is handed out until the next one is. The device holds two of them, in two buffers
    that never move; after the last block the first one is fetched for the pass to come.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Takes the blocks over one by one, so that host memory never has two copies of more than one."""
        super().__init__()
        self._device = device
        on_gpu = device.type == "cuda"
        self._host = []
        for block in blocks:
            self._host.append(_packed(block, pin=on_gpu))
        self._slots = [torch.empty_like(self._host[0], device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        for i, block in enumerate(blocks):
            _live_in(block, self._slots[i % 2])
            self.append(block)
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        # Of each buffer; a CPU copies and computes in turn anyway.
        self._copied = [torch.cuda.Event() for _ in self._slots] if on_gpu else []
        self._used = [torch.cuda.Event() for _ in self._slots] if on_gpu else []

    @property
    def resident(self) -> tuple[int | None, ...]:
        """The block that each buffer on the device holds, or is about to."""
        return tuple(self._held)

    @property
    def bytes_a_pass(self) -> int:
        """What a forward brings over the bus."""
        return sum(packed.nbytes for packed in self._host)

    def __iter__(self) -> Iterator[nn.Module]:
        count = len(self)
        for i in range(count):
            self._await(i)
            following = (i + 1) % count
            if following % 2 != i % 2:  # else, after the last of an odd number, it has to wait for its buffer
                self._fetch(following)
            try:
                yield self[i]
            finally:
                self._release(i)

    def _fetch(self, i: int) -> None:
        """Starts the copy of block ``i`` behind the work of the block whose buffer it takes."""
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


def _places(block: nn.Module) -> list[tuple[nn.Module, str, Tensor, int]]:
    """(owner, name, tensor, first byte) of every parameter and buffer of a block in one run of bytes."""
    found, at = [], 0
    for owner in block.modules():
        named: dict[str, Any] = {**owner._parameters, **owner._buffers}
        for name, tensor in named.items():
            if tensor is not None:
                found.append((owner, name, tensor, at))
                at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return found


def _packed(block: nn.Module, *, pin: bool) -> Tensor:
    """The block's weights as bytes on the host; the block itself then has none."""
    places = _places(block)
    *_, last, at = places[-1]
    size = at + -(-last.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for owner, name, tensor, first in places:
        packed[first : first + tensor.nbytes].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        _set(owner, name, tensor.detach().to("meta"))
    return packed


def _live_in(block: nn.Module, slot: Tensor) -> None:
    """The block's parameters become views of ``slot``."""
    for owner, name, tensor, first in _places(block):
        there = slot[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        _set(owner, name, there)


def _set(owner: nn.Module, name: str, tensor: Tensor) -> None:
    is_parameter = name in owner._parameters
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
