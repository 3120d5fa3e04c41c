"""Forwards as CUDA graphs: launched once, whatever the number of their kernels.

Launched one by one, the kernels of a layer kept four GPUs waiting for their hosts (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_rt.errors import one_line

log = logging.getLogger(__name__)

MOST_GRAPHS = 64
"""A session has two, more with several lengths of its interactive window, with guidance, or without a camera."""

SPARE_BYTES = 4 * 10**9
"""Nothing is captured while less device memory is free. A graph of the 14B's forward holds about 1 GB at 832x480."""

MOST_FAILURES = 3

_Inputs = tuple[Tensor, ...]
_Key = tuple[Hashable, Hashable]  # the layout, and the inputs' shapes and types
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
    are captured. Graphs take memory that nothing else needs, and are dropped when a session does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._failures = 0
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[_Key, _Captured] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()  # forwards that have run once
        self._pool = torch.cuda.graph_pool_handle()
        self.nbytes = 0  # of device memory that torch keeps for them, and gives to nothing else

    def clear(self) -> None:
        """Drops all graphs and gives their memory back. Sessions that go on are captured again."""
        torch.cuda.synchronize(self._device)
        self._forget()
        torch.cuda.empty_cache()

    def run(self, layout: Hashable, inputs: _Inputs, compute: _Compute, recording: _Recording) -> Tensor | None:
        """``compute(inputs)``, which may overwrite them, or a replay of it.

        ``layout`` must tell everything that it depends on beside the values of tensors: shapes, settings, and the
        addresses of tensors that are not among ``inputs``. Inside ``recording`` it is captured; what that yields is
        called at every replay.
        """
        key = layout, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        captured = self._graphs.get(key)
        if captured is None and key in self._seen and self._may_capture():
            captured = self._try_to_capture(key, inputs, compute, recording)
        if captured is None:
            _keep(self._seen, key, None)
            return compute(inputs)
        _keep(self._graphs, key, captured)
        return captured.replay(inputs)

    def _may_capture(self) -> bool:
        return self._failures < MOST_FAILURES and torch.cuda.mem_get_info(self._device)[0] >= SPARE_BYTES

    def _try_to_capture(self, key: _Key, inputs: _Inputs, compute: _Compute, recording: _Recording) -> _Captured | None:
        """None if it fails. The forward can then be launched kernel by kernel."""
        own = next((other.inputs for known, other in self._graphs.items() if known[1] == key[1]), None)
        before = torch.cuda.memory_reserved(self._device)
        try:
            captured = self._capture(own or tuple(map(torch.clone, inputs)), compute, recording)
        except RuntimeError as error:  # torch.OutOfMemoryError too
            reason = one_line(error)
        else:
            self.nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)
            return captured
        self._failures += 1
        times = f"{self._failures} of {MOST_FAILURES} times"
        log.warning("a forward was not captured as a CUDA graph (%s): %s", times, reason)
        self.clear()
        return None

    def _capture(self, own: _Inputs, compute: _Compute, recording: _Recording) -> _Captured:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), recording() as replayed:
            # Other threads of the server go on using the GPU. torch.cuda.graph would empty the allocator's cache.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                output = compute(own)
            finally:
                _end(graph, self._pool)
        current.wait_stream(self._stream)
        return _Captured(graph, own, output, replayed)


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        # Where the driver refuses the graph, torch would go on taking memory as during a capture.
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


def _keep(kept: OrderedDict[_Key, Any], key: _Key, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > MOST_GRAPHS:
        kept.popitem(last=False)
