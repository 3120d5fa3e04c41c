"""The ranks that share a session: this process's rank, and every exchange between ranks but ``peer_memory``'s.

NCCL carries tensors on a GPU, gloo tensors on a CPU. Legend: P ranks, N tokens of the chunk, n_r tokens of rank r.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_rt.errors import PeerLost, one_line
from lingbot_rt.parallel.packed import pack, unpack
from lingbot_rt.parallel.watchdog import Heartbeat

_COMMAND_BYTES = 8192
"""A ChunkPlan fits, so it takes one broadcast. The first frame of a SessionPlan does not, and takes a second one."""

_LENGTH_BYTES = 8

_UNLIMITED = timedelta(days=365)
"""Time limit of a collective: workers wait for commands while nobody plays. The watchdog has the real limits."""


class Ranks(Protocol):
    """What the engine asks of the ranks of a service, be it one process or several."""

    rank: int
    world: int  # number of ranks
    heartbeat: Heartbeat

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which talks to clients and has the frames. The others help to compute them."""

    def tick(self) -> None:
        """Counts progress, so that the watchdog does not take this rank for a stalled one."""

    def agree(self, flag: bool) -> bool:
        """Rank 0's ``flag``, on every rank."""

    def share(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each rank's ``numbers``, on every rank, in rank order. All ranks give equally many."""

    def begin_chunk(self) -> None:
        """Starts to count the time spent waiting for other ranks."""

    def end_chunk(self, total_ms: float) -> None:
        """Sets ``heartbeat.compute_ms``: ``total_ms`` of the chunk without the waits for other ranks.

        The device must have finished the chunk.
        """


class SingleRank:
    """The Ranks of a service with one process."""

    def __init__(self) -> None:
        self.rank = 0
        self.world = 1
        self.heartbeat = Heartbeat()

    @property
    def is_first(self) -> bool:
        return True

    def tick(self) -> None:
        self.heartbeat.ticks += 1

    def agree(self, flag: bool) -> bool:
        return flag

    def share(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]

    def begin_chunk(self) -> None: ...

    def end_chunk(self, total_ms: float) -> None:
        self.heartbeat.compute_ms = total_ms


_Wait = tuple[torch.cuda.Event, torch.cuda.Event]


class RankGroup:
    """The Ranks of a service with several processes. Every exchange raises PeerLost when another rank is gone."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self.heartbeat = Heartbeat()
        self.moved_bytes = 0  # sum over ``all_to_all`` and ``gather`` of max(bytes sent, bytes received) by this rank
        self._waited_ms = 0.0  # on the host, in this chunk
        self._waits: list[_Wait] = []  # on the device, in this chunk
        self._recorded: list[_Wait] | None = None  # while exchanges are captured

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def tick(self) -> None:
        self.heartbeat.ticks += 1

    def join(self, store: dist.Store, device: torch.device) -> None:
        """Waits until all ranks have joined. ``device`` is this rank's own."""
        on_gpu = device.type == "cuda"
        # NCCL's own watchdog would end the process before the client has been told.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        with self.exchanging():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("group", store),
                rank=self.rank,
                world_size=self.world,
                timeout=_UNLIMITED,
                device_id=device if on_gpu else None,
            )

    def leave(self) -> None:
        dist.destroy_process_group()

    def split(self, count: int) -> list[int]:
        """How many of ``count`` tokens or columns each rank gets: as even as possible, the first ranks get one more."""
        each, remainder = divmod(count, self.world)
        return [each + (rank < remainder) for rank in range(self.world)]

    def begin_chunk(self) -> None:
        self._waited_ms = 0.0
        self._waits.clear()

    def end_chunk(self, total_ms: float) -> None:
        on_device = sum(begin.elapsed_time(end) for begin, end in self._waits)
        self.heartbeat.compute_ms = max(0.0, total_ms - self._waited_ms - on_device)

    def agree(self, flag: bool) -> bool:
        # A byte on the host: this does not wait for the device's queue.
        word = torch.tensor([flag], dtype=torch.uint8)
        with self.exchanging():
            dist.broadcast(word, src=0)
        return bool(word.item())

    def share(self, numbers: Sequence[int]) -> list[list[int]]:
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        with self.exchanging():
            dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def send(self, command: Any) -> None:
        """On rank 0: gives ``command`` to every worker's ``receive``."""
        body = pack(command)
        packed = len(body).to_bytes(_LENGTH_BYTES, "little") + body
        first = torch.zeros(_COMMAND_BYTES, dtype=torch.uint8)
        head = packed[:_COMMAND_BYTES]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        with self.exchanging():
            dist.broadcast(first, src=0)
            if len(packed) > _COMMAND_BYTES:
                dist.broadcast(torch.frombuffer(bytearray(packed[_COMMAND_BYTES:]), dtype=torch.uint8), src=0)

    def receive(self, *kinds: type) -> Any:
        """On a worker: waits for the next command, without a time limit. ``kinds``: the classes that it may be of."""
        first = torch.empty(_COMMAND_BYTES, dtype=torch.uint8)
        with self.exchanging():
            dist.broadcast(first, src=0)
            packed = first.numpy().tobytes()
            length = int.from_bytes(packed[:_LENGTH_BYTES], "little")
            remaining = length - (_COMMAND_BYTES - _LENGTH_BYTES)
            if remaining > 0:
                second = torch.empty(remaining, dtype=torch.uint8)
                dist.broadcast(second, src=0)
                packed += second.numpy().tobytes()
        return unpack(packed[_LENGTH_BYTES : _LENGTH_BYTES + length], kinds)

    def all_to_all(
        self,
        sent: Tensor,
        received: Tensor,
        sent_rows: Sequence[int],
        received_rows: Sequence[int],
    ) -> None:
        """Sends ``sent_rows[r]`` rows of the contiguous ``sent`` to rank r and fills ``received`` in rank order."""
        assert sent.is_contiguous()  # NCCL refuses others, gloo takes them
        assert received.is_contiguous()
        row_bytes = sent[:1].nbytes
        self.moved_bytes += row_bytes * max(sum(rows) - rows[self.rank] for rows in (sent_rows, received_rows))
        with self.exchanging(sent.is_cuda):
            dist.all_to_all_single(received, sent, list(received_rows), list(sent_rows))

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites every rank's ``tensor`` with rank 0's."""
        with self.exchanging(tensor.is_cuda):
            dist.broadcast(tensor, src=0)

    def gather(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """Each rank's ``own`` [n_r, K] -> [N, K] on every rank, in rank order. ``rows`` lists n_r."""
        # gloo gathers tensors of one size only. The padding is at most one row per rank.
        largest = max(rows)
        padded = own.new_zeros(largest, own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in rows]
        self.moved_bytes += padded.nbytes * (self.world - 1)
        with self.exchanging(own.is_cuda):
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @contextmanager
    def recording(self) -> Iterator[Callable[[], None]]:
        """Exchanges inside are captured in a CUDA graph. What it yields counts them, once per replay.

        The waits of the newest replay in a chunk stand for those of the others.
        """
        waits: list[_Wait] = []

        def replayed() -> None:
            self.heartbeat.exchanges += len(waits)
            self._waits += waits

        self._recorded = waits
        try:
            yield replayed
        finally:
            self._recorded = None

    @contextmanager
    def exchanging(self, on_gpu: bool = False) -> Iterator[None]:
        """Counts the exchange, times the wait and turns a failure into PeerLost, unless it is this rank's own."""
        if self._recorded is not None:
            # In a graph an event is recorded at each replay, if it is an external one.
            captured = self._mark(external=True)
            yield
            self._recorded.append((captured, self._mark(external=True)))
            return
        self.heartbeat.exchanges += 1
        begun = time.perf_counter()
        begin = self._mark() if on_gpu else None
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            raise PeerLost(one_line(error)) from error
        if begin is not None:
            # The host runs on while the device waits.
            self._waits.append((begin, self._mark()))
        elif not on_gpu:
            self._waited_ms += 1000 * (time.perf_counter() - begun)

    @staticmethod
    def _mark(**options: bool) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, **options)
        event.record()
        return event
