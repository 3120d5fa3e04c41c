"""The attention window of one session: a fixed sink and a ring, written in place.

Keys are stored after RoPE at absolute positions, and softmax over keys does not depend on their order. So the newest
chunk overwrites the slots of the frames that leave the window, and nothing moves.

A window that some chunks see only the newest part of has more than one ring: the first one holds the newest frames. A
frame that leaves a ring is copied to the next one, once per chunk. So what a chunk sees is always one piece of memory.

A chunk before the newest one may be computed again, for another prompt. It sees what the window holds of itself and of
the frames before it, copied together, and those of its frames that have left the window stay out. A window that is
computed again as a whole has gaps until it is full; its chunks see copies too.

Shapes: L layers, S the keys and the values, B batch, N tokens, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lingbot_rt.models.quantize import FP8, hadamard, to_float8
from lingbot_rt.models.transfer import HostPlace, to_device


class KVCache:
    """K/V of the first ``sink_frames`` latent frames and of the newest ``window_frames - sink_frames``.

    ``dtype`` may be float8_e4m3fn: half the memory of bfloat16, and not exact.
    ``recent_frames``: the numbers of newest frames that ``limit`` may be asked for, each at least a chunk's.
    With ``batch`` > 1 several sessions at the same chunk share one cache, as in training.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        tokens_per_frame: int,
        sink_frames: int,
        window_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int = 1,
        recent_frames: Collection[int] = (),
    ) -> None:
        self.sink_frames = sink_frames
        self.window_frames = window_frames
        self._tokens_per_frame = tokens_per_frame
        shape = (num_layers, 2, batch, window_frames * tokens_per_frame, num_heads, head_dim)
        self._kv_LSBNHD = torch.zeros(shape, dtype=dtype, device=device)
        self._host = HostPlace()
        self._frames: list[int | None] = [None] * window_frames
        ring = window_frames - sink_frames
        ends = sorted({0, ring, *(count for count in recent_frames if count < ring)})
        self._rings = [(sink_frames + first, end - first) for first, end in pairwise(ends)]  # (first slot, slots)
        self._limit = window_frames
        # (first token in the chunk, first token in the cache, tokens); None: frames that have left the window
        self._spans: list[tuple[int, int | None, int]] = []
        self._seen: list[int] | None = None  # slots that a chunk before the newest one sees, in order
        self._rows: Tensor | None = None
        self._spans_of_rows: list[tuple[int, int | None, int]] = []

    @property
    def nbytes(self) -> int:
        return self._kv_LSBNHD.nbytes

    @property
    def missing_host_bytes(self) -> int:
        """Host memory that is still to be taken before the window can leave its GPU."""
        return self._host.missing_bytes(self._kv_LSBNHD)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which keys and values are kept."""
        return self._kv_LSBNHD.dtype

    @property
    def visible_frames(self) -> int:
        """Latent frames that a query attends to, with the current chunk."""
        if self._seen is not None:
            return len(self._seen)
        return min(sum(frame is not None for frame in self._frames), self._limit)

    @property
    def frame_of_slot(self) -> tuple[int | None, ...]:
        """The absolute latent frame in each slot."""
        return tuple(self._frames)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the current chunk."""
        return sum(count for _, _, count in self._spans)

    @property
    def shape_of_frame(self) -> tuple[int, ...]:
        """[L, 2, B, N, H, D] of one latent frame."""
        shape = self._kv_LSBNHD.shape
        return (*shape[:3], self._tokens_per_frame, *shape[4:])

    @property
    def rows(self) -> Tensor:
        """int64 [chunk tokens]: the row of ``layer`` in which each token of the current chunk is kept; -1: nowhere.

        It stays in one place while chunks have the same size, so a captured forward reads the newest.
        """
        if self._rows is None or self._spans_of_rows != self._spans:
            runs = [
                torch.full((count,), -1) if target is None else torch.arange(target, target + count)
                for _, target, count in self._spans
            ]
            rows = to_device(torch.cat(runs), self._kv_LSBNHD.device)
            self._rows = rows if self._rows is None or len(self._rows) != len(rows) else self._rows.copy_(rows)
            self._spans_of_rows = self._spans
        return self._rows

    @property
    def repeats(self) -> bool:
        """Whether later chunks see as many frames in the same memory as this one: the window is full."""
        is_kept = all(target is not None for _, target, _ in self._spans)
        return self._seen is None and is_kept and self.visible_frames == self._limit

    @property
    def layout(self) -> tuple[int, ...]:
        """What a captured forward of the current chunk depends on: addresses and sizes."""
        kv, rows, tokens = self._kv_LSBNHD, self.rows, self._tokens_per_frame
        return kv.data_ptr(), *kv.shape, kv.itemsize, rows.data_ptr(), len(rows), tokens * self.visible_frames

    def may_hold(self, slot: int, frame: int) -> bool:
        """Whether a window with this sink and these rings ever has ``frame`` in ``slot``."""
        if slot < self.sink_frames or frame < self.sink_frames:
            return slot == frame
        first, count = next((first, count) for first, count in self._rings if first <= slot < first + count)
        return (frame - self.sink_frames) % count == slot - first

    def release(self) -> None:
        """Frees the window's memory, whoever still holds this cache. Nothing else may be called afterwards."""
        self._kv_LSBNHD = self._kv_LSBNHD.new_empty(0)
        self._host = HostPlace()

    def limit(self, recent_frames: int | None) -> None:
        """From now on a query attends to the sink and to the newest ``recent_frames`` others; None: to the window.

        ``recent_frames`` counts the current chunk, and is one of those that the cache was made for.
        """
        self._limit = self.window_frames if recent_frames is None else self.sink_frames + recent_frames
        assert any(self._limit == first + count for first, count in self._rings), recent_frames

    def begin(self, start_frame: int, num_frames: int) -> None:
        """Starts a forward of the chunk [start_frame, start_frame + num_frames) and picks its slots.

        It is the newest chunk, the next one, or one before of which the window ``holds`` frames.
        """
        end = start_frame + num_frames
        self._seen = None
        slots: list[int | None]
        is_older = any(frame is not None and frame >= end for frame in self._frames)
        if is_older:
            slots = [self._frames.index(frame) if frame in self._frames else None for frame in range(start_frame, end)]
        else:
            slots = [self._slot_of(frame) for frame in range(start_frame, end)]
        if is_older or self._has_gaps:
            self._seen = self._slots_before(end)
        tokens = self._tokens_per_frame
        self._spans = [
            (first * tokens, None if slot is None else slot * tokens, count * tokens)
            for first, slot, count in _runs(slots)
        ]

    def holds(self, start_frame: int, num_frames: int) -> bool:
        """Whether any of these frames is in the window."""
        return any(frame in self._frames for frame in range(start_frame, start_frame + num_frames))

    @property
    def _has_gaps(self) -> bool:
        """Whether a free slot comes before a used one: after ``clear``, while not every frame is computed again."""
        used = [frame is not None for frame in self._frames]
        return used != sorted(used, reverse=True)

    def clear(self) -> None:
        """Forgets every frame, so that the window can be filled again. Its memory stays."""
        self._frames = [None] * self.window_frames
        self._spans, self._seen = [], None

    def read(self, frame: int) -> Tensor:
        """K/V [L, 2, B, N, H, D] of one latent frame that the window holds, copied to the host."""
        return self._slot(self._frames.index(frame)).to("cpu", copy=True)

    def load(self, frame_of_slot: Sequence[int | None], read: Callable[[int], Tensor]) -> None:
        """Fills the window with what ``frame_of_slot`` and ``read`` gave of one like it."""
        self.clear()
        for slot, frame in enumerate(frame_of_slot):
            if frame is not None:
                self._slot(slot).copy_(read(frame))
        self._frames = list(frame_of_slot)

    def move(self, device: torch.device) -> None:
        """Moves the window to ``device``; it is there once the stream has come so far."""
        self._kv_LSBNHD = self._host.move(self._kv_LSBNHD, device)

    def _slot(self, slot: int) -> Tensor:
        """[L, 2, B, N, H, D]"""
        return self._kv_LSBNHD[:, :, :, slot * self._tokens_per_frame : (slot + 1) * self._tokens_per_frame]

    def _slots_before(self, end: int) -> list[int]:
        """Slots of the frames before ``end`` that a query may see, in the order of memory."""
        found = {frame: slot for slot, frame in enumerate(self._frames) if frame is not None and frame < end}
        others = sorted(frame for frame in found if frame >= self.sink_frames)
        hidden = others[: max(0, len(others) - (self._limit - self.sink_frames))]
        return sorted(slot for frame, slot in found.items() if frame not in hidden)

    def _slot_of(self, frame: int) -> int:
        """The slot of a frame of the current chunk. A new frame pushes older ones on, from ring to ring."""
        if frame < self.sink_frames:
            self._frames[frame] = frame
            return frame
        slots: list[int] = []
        entering = frame
        for first, count in self._rings:
            slots.append(first + (entering - self.sink_frames) % count)
            leaving = self._frames[slots[-1]]
            if leaving is None or leaving == frame:
                break
            entering = leaving
        for target, source in pairwise(reversed(slots)):
            self._copy(source, target)
        self._frames[slots[0]] = frame
        return slots[0]

    def _copy(self, source: int, target: int) -> None:
        """The frame in slot ``source`` to slot ``target``, in all layers."""
        self._slot(target).copy_(self._slot(source))
        self._frames[target] = self._frames[source]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of ``layer``, [B, N, H, D] each, of the whole window. ``rows`` says what may be written."""
        return self._kv_LSBNHD[layer, 0], self._kv_LSBNHD[layer, 1]

    def write(self, layer: int, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        """Writes the current chunk's K/V of ``layer`` into its slots. In fp8 keys are mixed by ``hadamard``."""
        if self.dtype == FP8:
            k_BNHD, v_BNHD = to_float8(hadamard(k_BNHD)), to_float8(v_BNHD)
        k_slots, v_slots = self.layer(layer)
        for source, target, count in self._spans:
            if target is not None:  # else it was computed with its chunk, and is kept nowhere
                k_slots[:, target : target + count].copy_(k_BNHD[:, source : source + count])
                v_slots[:, target : target + count].copy_(v_BNHD[:, source : source + count])

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Visible keys and values of ``layer``, [B, visible tokens, H, D] each: a prefix, as slots fill in order.

        For a chunk before the newest one they are copies.
        """
        tokens = self._tokens_per_frame
        if self._seen is not None:
            # As bytes: not every kernel joins float8.
            kv = self._kv_LSBNHD[layer].view(torch.uint8)
            runs = [
                kv[:, :, slot * tokens : (slot + count) * tokens]
                for _, slot, count in _runs(self._seen)
                if slot is not None
            ]
            k, v = torch.cat(runs, dim=2).view(self.dtype)
            return k, v
        visible = self.visible_frames * tokens
        return self._kv_LSBNHD[layer, 0, :, :visible], self._kv_LSBNHD[layer, 1, :, :visible]


def _runs(slots: Sequence[int | None]) -> list[tuple[int, int | None, int]]:
    """(index of the first, its slot, how many) of each run of neighbours, or of frames without a slot."""
    runs: list[tuple[int, int | None, int]] = []
    for index, slot in enumerate(slots):
        if runs:
            first, before, count = runs[-1]
            if slot == (None if before is None else before + count):
                runs[-1] = (first, before, count + 1)
                continue
        runs.append((index, slot, 1))
    return runs
