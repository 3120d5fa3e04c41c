"""The clean latents of the window's chunks, and the order in which these are computed again for a new prompt.

A chunk's K/V hold the prompt that it was made with. After a switch the window therefore keeps something of the old one,
in its sink for good. With their latents the chunks are committed again under the new prompt, one per chunk of the
session, so that none is late by more than one context pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lingbot_rt.session.camera_path import Pose


@dataclass(frozen=True, slots=True)
class CommittedChunk:
    """A finished chunk: what a context pass of it needs, beside the text."""

    index: int
    latents: Tensor  # [1, z, F, h, w], clean
    relative_poses: Pose | None
    lenses: Pose | None = None  # (fx, fy, cx, cy) [F, 4] in pixels; None: the model's own lens


class Recache:
    """One session's. Holds as many chunks as its window."""

    def __init__(self, sink_chunks: int, holds: Callable[[int], bool]) -> None:
        """``sink_chunks``: chunks that the sink has frames of. ``holds(index)``: whether the window has some of one."""
        self._sink_chunks = sink_chunks
        self._holds = holds
        self._kept: list[CommittedChunk] = []  # in the order of the session
        self._pending: deque[CommittedChunk] = deque()

    @property
    def newest(self) -> Tensor | None:
        """The latents of the newest finished chunk."""
        return self._kept[-1].latents if self._kept else None

    def keep(self, chunk: CommittedChunk) -> None:
        """To be called after a chunk's context pass. Forgets what has left the window."""
        self._kept = [each for each in self._kept if self._holds(each.index)] + [chunk]

    def begin(self) -> None:
        """All chunks of the window are to be computed again.

        The sink's come first and in order: it stays for good, and nothing before it is old. Of the others the newest
        comes first, as it stays longest. The oldest leave the window before their turn.
        """
        sink = [chunk for chunk in self._kept if chunk.index < self._sink_chunks]
        self._pending = deque(sink + self._kept[len(sink) :][::-1])

    def stop(self) -> None:
        """The prompt changed, and what is left is not computed again."""
        self._pending.clear()

    def next(self) -> CommittedChunk | None:
        """The next chunk to compute again; those that have left the window meanwhile are passed over."""
        while self._pending:
            chunk = self._pending.popleft()
            if self._holds(chunk.index):
                return chunk
        return None

    def release(self) -> None:
        self._kept.clear()
        self._pending.clear()
