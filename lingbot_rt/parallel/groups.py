"""This process among those that share a session: its rank, and everything that ranks say to each other.

NCCL carries what is on a GPU, gloo what is on a CPU. Legend: P ranks, N tokens of the chunk, n_r those of rank r.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_rt.errors import PeerLost
from lingbot_rt.parallel.watch import Pulse, first_line

_COMMAND_BYTES = 8192
"""A ChunkPlan fits, so it takes one broadcast; the picture of a SessionPlan follows in a second one."""

_LENGTH_BYTES = 8

_UNLIMITED = timedelta(days=365)
"""Of a collective: followers wait for the next command as long as nobody plays, and the watch judges the rest."""


class Ranks:
    """One process alone: it has nobody to ask and shares nothing."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world
        self.pulse = Pulse()

    @property
    def is_first(self) -> bool:
        """Rank 0 decodes and speaks to clients; the others only help to denoise."""
        return self.rank == 0

    def tick(self) -> None:
        """Something went on: the watch shall not take this rank for a stalled one."""
        self.pulse.ticks += 1

    def agree(self, flag: bool) -> bool:
        """Rank 0's ``flag``, on every rank."""
        return flag

    def begin_chunk(self) -> None:
        """Waits for other ranks are counted from here on."""

    def end_chunk(self, total_ms: float) -> None:
        """The chunk took ``total_ms``, its device is done: what was not spent waiting for other ranks is this one's."""
        self.pulse.compute_ms = total_ms

    def share(self, count: int) -> list[int]:
        """``count`` tokens split over the ranks as evenly as whole tokens allow; earlier ranks get one more."""
        whole, rest = divmod(count, self.world)
        return [whole + (rank < rest) for rank in range(self.world)]


class RankGroup(Ranks):
    """All processes of a service. Raises PeerLost wherever another rank is gone."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.moved_bytes = 0  # to other ranks or from them, whichever is more: of what is spread over them
        self._waited_ms = 0.0  # on the host, in this chunk
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # on the device

    def join(self, store: dist.Store, device: torch.device) -> None:
        """Waits for all ranks to come. ``device`` is this rank's own."""
        on_gpu = device.type == "cuda"
        # NCCL's own watchdog would end the process before the client has been told.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        with self._exchange():
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

    def new_group(self) -> dist.ProcessGroup:
        """All ranks again, for exchanges that run on another stream; every rank has to ask."""
        with self._exchange():
            return dist.new_group(timeout=_UNLIMITED)

    def begin_chunk(self) -> None:
        self._waited_ms = 0.0
        self._waits.clear()

    def end_chunk(self, total_ms: float) -> None:
        on_device = sum(begin.elapsed_time(end) for begin, end in self._waits)
        self.pulse.compute_ms = max(0.0, total_ms - self._waited_ms - on_device)

    def agree(self, flag: bool) -> bool:
        # A byte on the host: the device's queue is not waited for.
        word = torch.tensor([flag], dtype=torch.uint8)
        with self._exchange():
            dist.broadcast(word, src=0)
        return bool(word.item())

    def send(self, command: Any) -> None:
        """Rank 0: gives ``command`` to every follower's ``receive``."""
        body = pickle.dumps(command)
        packed = len(body).to_bytes(_LENGTH_BYTES, "little") + body
        first = torch.zeros(_COMMAND_BYTES, dtype=torch.uint8)
        head = packed[:_COMMAND_BYTES]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        with self._exchange():
            dist.broadcast(first, src=0)
            if len(packed) > _COMMAND_BYTES:
                dist.broadcast(torch.frombuffer(bytearray(packed[_COMMAND_BYTES:]), dtype=torch.uint8), src=0)

    def receive(self) -> Any:
        """A follower: waits for the next command, as long as it takes."""
        first = torch.empty(_COMMAND_BYTES, dtype=torch.uint8)
        with self._exchange():
            dist.broadcast(first, src=0)
            packed = first.numpy().tobytes()
            length = int.from_bytes(packed[:_LENGTH_BYTES], "little")
            rest = length - (_COMMAND_BYTES - _LENGTH_BYTES)
            if rest > 0:
                second = torch.empty(rest, dtype=torch.uint8)
                dist.broadcast(second, src=0)
                packed += second.numpy().tobytes()
        return pickle.loads(packed[_LENGTH_BYTES : _LENGTH_BYTES + length])

    def all_to_all(
        self,
        sent: Tensor,
        received: Tensor,
        sent_rows: Sequence[int],
        received_rows: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Rows of the contiguous ``sent``, ``sent_rows[r]`` of them for rank r, into ``received``, by rank likewise."""
        row_bytes = sent[:1].nbytes
        self.moved_bytes += row_bytes * max(sum(rows) - rows[self.rank] for rows in (sent_rows, received_rows))
        with self._exchange(sent.is_cuda, beside=group is not None):
            dist.all_to_all_single(received, sent, list(received_rows), list(sent_rows), group)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values, in every rank's ``tensor``."""
        with self._exchange(tensor.is_cuda):
            dist.broadcast(tensor, src=0)

    def gather(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """Every rank's ``own`` [n_r, K], joined in the order of ranks -> [N, K] on every rank."""
        # One size for all, the largest: gloo gathers no uneven ones. Less than a row of tokens is wasted.
        largest = max(rows)
        padded = own.new_zeros(largest, own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in rows]
        self.moved_bytes += padded.nbytes * (self.world - 1)
        with self._exchange(own.is_cuda):
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @contextmanager
    def _exchange(self, on_gpu: bool = False, *, beside: bool = False) -> Iterator[None]:
        """Counts the exchange, times the wait, and names what breaks. ``beside``: not on the stream of the chunk, which
        does not wait for it."""
        self.pulse.exchanges += 1
        begun = time.perf_counter()
        begin = self._mark() if on_gpu and not beside else None
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(first_line(error)) from error
        if begin is not None:
            # The host runs on while the device waits.
            self._waits.append((begin, self._mark()))
        elif not on_gpu:
            self._waited_ms += 1000 * (time.perf_counter() - begun)

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
