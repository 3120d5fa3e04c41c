"""The order in which the window's chunks are computed again for a new prompt.

A chunk's K/V hold the prompt that it was made with. After a switch the window therefore keeps something of the old one,
in its sink for good. With their latents the chunks are committed again under the new prompt, one per chunk of the
session, so that none is late by more than one context pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from lingbot_rt.engine.history import KeptChunk


class Recache:
    """One session's."""

    def __init__(self, sink_chunks: int, holds: Callable[[int], bool]) -> None:
        """``sink_chunks``: chunks that the sink has frames of. ``holds(index)``: whether the window has some of one."""
        self._sink_chunks = sink_chunks
        self._holds = holds
        self._pending: deque[KeptChunk] = deque()

    @property
    def pending(self) -> tuple[int, ...]:
        """The chunks that are still to be computed again."""
        return tuple(chunk.index for chunk in self._pending)

    def begin(self, window: list[KeptChunk]) -> None:
        """All chunks of ``window``, in the order of the session, are to be computed again.

        The sink's come first and in order: it stays for good, and nothing before it is old. Of the others the newest
        comes first, as it stays longest. The oldest leave the window before their turn.
        """
        sink = [chunk for chunk in window if chunk.index < self._sink_chunks]
        self._pending = deque(sink + window[len(sink) :][::-1])

    def go_on(self, window: Iterable[KeptChunk], pending: Iterable[int]) -> None:
        """``pending`` of another time, when the window was this one."""
        by_index = {chunk.index: chunk for chunk in window}
        self._pending = deque(by_index[index] for index in pending if index in by_index)

    def stop(self) -> None:
        """The prompt changed, and what is left is not computed again."""
        self._pending.clear()

    def next(self) -> KeptChunk | None:
        """The next chunk to compute again; those that have left the window meanwhile are passed over."""
        while self._pending:
            chunk = self._pending.popleft()
            if self._holds(chunk.index):
                return chunk
        return None
