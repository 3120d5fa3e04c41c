"""The attention window of one session: a fixed sink and a ring, written in place.

Keys are stored after RoPE at absolute positions, and softmax over keys does not depend on their order. So the newest
chunk overwrites the slots of the frames that leave the window, and nothing moves.

Shapes: L layers, S the keys and the values, B batch, N tokens, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """K/V of the first ``sink_frames`` latent frames and of the newest ``window_frames - sink_frames``.

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

    def write(self, layer: int, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        """Writes the current chunk's K/V of ``layer`` into its slots."""
        for source, target, count in self._spans:
            self._kv_LSBNHD[layer, 0, :, target : target + count] = k_BNHD[:, source : source + count]
            self._kv_LSBNHD[layer, 1, :, target : target + count] = v_BNHD[:, source : source + count]

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Visible keys and values of ``layer``, [B, visible tokens, H, D] each: a prefix, as slots fill in order."""
        visible = self.visible_frames * self._tokens_per_frame
        return self._kv_LSBNHD[layer, 0, :, :visible], self._kv_LSBNHD[layer, 1, :, :visible]
