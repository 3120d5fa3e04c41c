"""Where a network rests and where it works: on its device for good, or on the CPU between visits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


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
