"""The attention window of one session: a fixed sink and a ring, written in place.

Keys are stored after RoPE at absolute positions, and softmax over keys does not depend on their order. So the newest
chunk overwrites the slots of the frames that leave the window, and nothing moves.

Shapes: L layers, S the keys and the values, B batch, N tokens, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lingbot_rt.models.quantize import FP8, hadamard, to_float8


class KVCache:
    """K/V of the first ``sink_frames`` latent frames and of the newest ``window_frames - sink_frames``.

    ``dtype`` may be float8_e4m3fn: half the memory of bfloat16, and not exact.
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
    ) -> None:
        self.sink_frames = sink_frames
        self.window_frames = window_frames
        self._tokens_per_frame = tokens_per_frame
        shape = (num_layers, 2, batch, window_frames * tokens_per_frame, num_heads, head_dim)
        self._kv_LSBNHD = torch.zeros(shape, dtype=dtype, device=device)
        self._frames: list[int | None] = [None] * window_frames
        self._spans: list[tuple[int, int, int]] = []  # (first token in the chunk, first token in the cache, tokens)

    @property
    def nbytes(self) -> int:
        return self._kv_LSBNHD.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """The type in which keys and values are kept."""
        return self._kv_LSBNHD.dtype

    @property
    def visible_frames(self) -> int:
        """Latent frames that a query attends to, with the current chunk."""
        return sum(frame is not None for frame in self._frames)

    @property
    def frame_of_slot(self) -> tuple[int | None, ...]:
        """The absolute latent frame in each slot."""
        return tuple(self._frames)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the current chunk."""
        return sum(count for _, _, count in self._spans)

    def release(self) -> None:
        """Frees the window's memory, whoever still holds this cache. Nothing else may be called afterwards."""
        self._kv_LSBNHD = self._kv_LSBNHD.new_empty(0)

    def begin(self, start_frame: int, num_frames: int) -> None:
        """Starts a forward of the chunk [start_frame, start_frame + num_frames) and picks its slots."""
        ring = self.window_frames - self.sink_frames
        slots = []
        for frame in range(start_frame, start_frame + num_frames):
            slot = frame if frame < self.sink_frames else self.sink_frames + (frame - self.sink_frames) % ring
            self._frames[slot] = frame
            slots.append(slot)
        tokens = self._tokens_per_frame
        self._spans = []
        first = 0
        for i in range(1, num_frames + 1):
            if i == num_frames or slots[i] != slots[i - 1] + 1:
                self._spans.append((first * tokens, slots[first] * tokens, (i - first) * tokens))
                first = i

    def slots(self, layer: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(tokens of the chunk, their keys [B, n, H, D], their values) of ``layer``, to be written in place."""
        for source, target, count in self._spans:
            kv_SBNHD = self._kv_LSBNHD[layer, :, :, target : target + count]
            yield slice(source, source + count), kv_SBNHD[0], kv_SBNHD[1]

    def write(self, layer: int, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        """Writes the current chunk's K/V of ``layer`` into its slots. In fp8 keys are mixed by ``hadamard``."""
        if self.dtype == FP8:
            k_BNHD, v_BNHD = to_float8(hadamard(k_BNHD)), to_float8(v_BNHD)
        for tokens, k_slot, v_slot in self.slots(layer):
            k_slot.copy_(k_BNHD[:, tokens])
            v_slot.copy_(v_BNHD[:, tokens])

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Visible keys and values of ``layer``, [B, visible tokens, H, D] each: a prefix, as slots fill in order."""
        visible = self.visible_frames * self._tokens_per_frame
        return self._kv_LSBNHD[layer, 0, :, :visible], self._kv_LSBNHD[layer, 1, :, :visible]
