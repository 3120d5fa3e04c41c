"""Training steps as CUDA graphs: launching their thousands of small kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3
"""Calls before the capture. Compilation, the choice of convolution algorithms and lazy tables happen in them."""


class Captured:
    """A function without arguments. On CUDA the first call captures it as a graph, and every call replays that.

    The function must read its inputs from tensors that stay where they are, have no result that depends on the host,
    and set ``.grad`` to None before a backward pass. Its results are overwritten by the next call. On other devices it
    is called as it is.
    """

    def __init__(self, function: Callable[[], dict[str, Tensor]], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, Tensor]:
        if self._device.type != "cuda":
            return self._function()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._results

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self._function()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread of its own, which may ask for events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._results = self._function()
        self._graph = graph
