"""Forwards as CUDA graphs: launched once, whatever the number of their kernels.

Launching a layer's kernels one by one takes a host about 1.5 ms, which is more than four GPUs need to compute it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_rt.errors import one_line

log = logging.getLogger(__name__)

MOST_GRAPHS = 16
"""A session has two, more with several lengths of its interactive window, with guidance, or without a camera."""

_Inputs = tuple[Tensor, ...]
_Compute = Callable[[_Inputs], Tensor | None]
_Recording = Callable[[], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    output: Tensor | None
    replayed: Callable[[], None]

    def replay(self, inputs: _Inputs) -> Tensor | None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        self.replayed()
        return None if self.output is None else self.output.clone()


class CapturedForwards:
    """The captured forwards of one DiT. They run in turn, and share their memory.

    A forward runs twice before it is replayed: the first time its kernels are compiled and loaded, the second time they
    are captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._works = True
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: seen once
        self._inputs: dict[Hashable, _Inputs] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.nbytes = 0  # of device memory that torch keeps for them, and gives to nothing else

    def clear(self) -> None:
        """Drops all graphs and gives their memory back. Sessions that go on are captured again."""
        torch.cuda.synchronize(self._device)
        self._forget()
        torch.cuda.empty_cache()

    def missing_bytes(self, forward_bytes: int) -> int:
        """Device memory that capturing a forward of ``forward_bytes`` would take in addition."""
        return max(0, forward_bytes - self.nbytes) if self._works else 0

    def run(self, layout: Hashable, inputs: _Inputs, compute: _Compute, recording: _Recording) -> Tensor | None:
        """``compute(inputs)``, which may overwrite them, or a replay of it.

        ``layout`` must tell everything that it depends on beside the values of tensors: shapes, settings, and the
        addresses of tensors that are not among ``inputs``. Inside ``recording`` it is captured; what that yields is
        called at every replay.
        """
        sizes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        key = layout, sizes
        if not self._works or key not in self._graphs:
            self._keep(key, None)
            return compute(inputs)
        captured = self._graphs[key]
        if captured is None:
            try:
                captured = self._capture(sizes, inputs, compute, recording)
            except RuntimeError as error:  # torch.OutOfMemoryError too
                self._works = False
                log.warning("forwards are not captured as CUDA graphs any more: %s", one_line(error))
                return compute(inputs)
        self._keep(key, captured)
        return captured.replay(inputs)

    def _keep(self, key: Hashable, captured: _Captured | None) -> None:
        self._graphs[key] = captured
        self._graphs.move_to_end(key)
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _capture(self, sizes: Hashable, inputs: _Inputs, compute: _Compute, recording: _Recording) -> _Captured:
        if sizes not in self._inputs:
            self._inputs[sizes] = tuple(map(torch.clone, inputs))
        own, graph, before = self._inputs[sizes], torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), recording() as replayed:
            # Other threads of the server go on using the GPU. torch.cuda.graph would empty the allocator's cache.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                output = compute(own)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self.nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return _Captured(graph, own, output, replayed)
