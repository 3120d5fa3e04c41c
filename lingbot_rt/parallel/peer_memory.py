"""Memory that the GPUs of one host write into for each other, over NVLink or PCIe.

A kernel that makes values for other ranks writes them where those ranks read them. Nothing is packed, sent and unpacked
as with NCCL, and the transfer takes place while the kernel computes. On two H200 a kernel that only copies q, k and v
of a layer of the 14B (36 MB in bfloat16) takes 111 us, nearly all of it the link's; NCCL takes 145 us.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_rt.config_values import environment_value
from lingbot_rt.errors import PeerLost, one_line
from lingbot_rt.parallel.groups import RankGroup

log = logging.getLogger(__name__)

SHIFT_BYTES = 16
"""Unit of the distances between the ranks' places: as much as a thread stores at once."""

_ROUND_BYTES = 2**21  # what a GPU maps at once


_connected = False
"""Whether this process has exchanged addresses with others. torch counts these exchanges by process, not by group: in a
later group the ranks would wait for each other under different numbers until the store's time limit."""


class PeerMemory:
    """Two places on each rank's GPU that every rank may write into, used in turn.

    An exchange is ``place``, kernels that write, and ``wait``. What has arrived must be read, in the order of the
    stream, before the next ``wait``: the exchange after that writes over it. All ranks must make the same exchanges in
    the same order, on one stream each.
    """

    def __init__(self, ranks: RankGroup, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._place_bytes = 0
        self._second = False
        self._buffer: Tensor | None = None
        self._handle: Any = None
        self._shifts: Tensor | None = None
        self._times_taken = 0

    @property
    def layout(self) -> tuple[int, bool]:
        """The memory, by number, and which place comes next."""
        return self._times_taken, self._second

    @property
    def shifts(self) -> Tensor:
        """int64 [P]: from this rank's place to the same place of each rank, in units of ``SHIFT_BYTES``."""
        assert self._shifts is not None, "before the first place"
        return self._shifts

    def missing_bytes(self, place_bytes: int) -> int:
        """Device memory that places of ``place_bytes`` would take in addition."""
        return 2 * max(0, _rounded(place_bytes) - self._place_bytes)

    def place(self, own_bytes: int, largest_bytes: int) -> Tensor:
        """uint8 [own_bytes] on this rank, which others write into. ``largest_bytes``: the most that any rank asks for.

        Every rank takes more memory when this is more than ever before.
        """
        if largest_bytes > self._place_bytes:
            self._grow(largest_bytes)
        self._second = not self._second
        assert self._buffer is not None
        return self._buffer.narrow(0, self._place_bytes * self._second, own_bytes)

    def wait(self) -> None:
        """Makes the stream wait until all ranks have written."""
        with self._ranks.exchanging(on_gpu=True):
            self._handle.barrier()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Exchanges inside are captured, not made: the next one takes the place that it would have taken before."""
        before = self._second
        try:
            yield
        finally:
            self._second = before

    def even_out(self) -> None:
        """The next exchange takes the place of the first one again. What has arrived must have been read."""
        if self._second:
            self.wait()
            self._second = False

    def push_rows(self, sent_NK: Tensor, to_nPK: Tensor) -> None:
        """Writes the contiguous rows [N, K] to the ranks whose tokens they are, and waits for what they write here.

        ``to_nPK`` is this rank's place [n, P, K]: row i of rank r comes to [i, r].
        """
        from lingbot_rt.models.fused_kernels import push_rows

        with self._ranks.exchanging(on_gpu=True):
            push_rows(sent_NK, to_nPK[:, self._ranks.rank], self.shifts)
            self._handle.barrier()

    def try_out(self) -> None:
        """Takes a little memory and waits for all ranks. Raises RuntimeError where that does not work."""
        self._take(_ROUND_BYTES)
        self._handle.barrier()
        torch.cuda.synchronize(self._device)

    def _grow(self, place_bytes: int) -> None:
        """Raises OutOfMemoryError, PeerLost."""
        torch.cuda.synchronize(self._device)
        self._ranks.share([0])  # nobody writes into the old memory any more once all ranks have come so far
        self._buffer = self._handle = self._shifts = None
        torch.cuda.empty_cache()  # the driver does not know what torch keeps free
        try:
            self._take(_rounded(place_bytes))
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(one_line(error)) from error
            raise PeerLost(one_line(error)) from error

    def _take(self, place_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        global _connected
        _connected = True
        group = dist.group.WORLD
        assert group is not None, "the ranks have joined"
        self._buffer = symmetric.empty(2 * place_bytes, dtype=torch.uint8, device=self._device)
        self._handle = symmetric.rendezvous(self._buffer, group)
        self._place_bytes = place_bytes
        addresses: Sequence[int] = self._handle.buffer_ptrs
        distances = [(address - addresses[self._ranks.rank]) // SHIFT_BYTES for address in addresses]
        self._shifts = torch.tensor(distances, dtype=torch.int64, device=self._device)
        self._times_taken += 1


def _rounded(count: int) -> int:
    return -(-count // _ROUND_BYTES) * _ROUND_BYTES


def open_peer_memory(ranks: RankGroup, device: torch.device) -> PeerMemory | None:
    """None where the ranks' GPUs cannot write into each other's memory. Every rank must call it."""
    if device.type != "cuda":
        return None
    reason = _missing(ranks)
    peers = PeerMemory(ranks, torch.device("cuda", torch.cuda.current_device()))
    if all(possible for (possible,) in ranks.share([not reason])):
        try:
            peers.try_out()
        except RuntimeError as error:
            reason = one_line(error)
        if all(works for (works,) in ranks.share([not reason])):
            return peers
    if ranks.is_first:
        log.warning("the GPUs exchange through NCCL only: %s", reason or "another rank has no access")
    return None


def _missing(ranks: RankGroup) -> str:
    """Why this rank's GPU cannot write into the memory of the others; empty if it can."""
    if _connected:
        return "torch connects a process with one group of ranks only, and this one had another"
    if int(environment_value("LOCAL_WORLD_SIZE") or ranks.world) != ranks.world:
        return "they are on several hosts"
    try:
        import torch.distributed._symmetric_memory
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    own = torch.cuda.current_device()
    if torch.cuda.device_count() < ranks.world:
        return "this process does not see the other GPUs"
    others = [other for other in range(ranks.world) if other != own]
    closed = [other for other in others if not torch.cuda.can_device_access_peer(own, other)]
    return f"GPU {own} has no access to the memory of {', '.join(map(str, closed))}" if closed else ""
