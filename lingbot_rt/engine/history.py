"""The chunks that a session has finished, on the host: what its window can be computed from again, and as many before
them as fit, so that the session can go back.

Boundary k lies before chunk k. A session that goes back to one either forgets what came after it, or begins a new
branch there and leaves the old one as it is. Branches share the chunks before they part.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.camera_path import Pose

MAX_BRANCHES = 32
"""Most branches of a session, the first included."""


@dataclass(eq=False, slots=True)
class WholeState:
    """What is exact after a chunk and cannot be computed again without all chunks before it. On the host."""

    frame_of_slot: tuple[int | None, ...]  # of the window, or of both windows
    kv: dict[int, tuple[Tensor, ...]]  # by latent frame of this chunk: [L, 2, 1, N, H, D] of each window
    again: dict[int, tuple[Tensor, ...]]  # the same of older chunks, as far as they were computed again meanwhile
    new_again: tuple[int, ...]  # the frames of ``again`` that were computed again with this chunk
    features: list[Tensor | str | None]  # of the VAE's decoder; empty: not known, of older chunks of a snapshot
    last_frame: Tensor | None  # that interpolation goes on from

    @property
    def nbytes(self) -> int:
        windows = [kv for both in self.kv.values() for kv in both]
        windows += [kv for frame in self.new_again for kv in self.again[frame]]
        features = [slot for slot in self.features if isinstance(slot, Tensor)]
        last = [] if self.last_frame is None else [self.last_frame]
        return sum(tensor.nbytes for tensor in (*windows, *features, *last))


@dataclass(eq=False, slots=True)
class KeptChunk:
    """A finished chunk: what its context pass needed, and how the session stood after it. Tensors are on the host."""

    index: int
    latents: Tensor  # [1, z, F, h, w], clean
    prompt: str
    relative_poses: Pose | None
    lenses: Pose | None  # (fx, fy, cx, cy) [F, 4] in pixels; None: the model's own lens
    recent_frames: int | None  # that the chunk saw beside the sink; None: the window
    recached: int | None  # the older chunk that was computed again before this one
    prompts: dict[int, str]  # of the older chunks in the window that were computed again, the newest one
    pending: tuple[int, ...]  # chunks that are still to be computed again, in this order
    random_state: Tensor  # of the noise generator
    whole: WholeState | None = None

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes + self.random_state.nbytes + (0 if self.whole is None else self.whole.nbytes)


def window_indices(latent_frames: int, sink_frames: int, window_frames: int, boundary: int) -> list[int]:
    """The chunks of which a window has frames at a boundary, in order."""
    sink_chunks = min(boundary, -(-sink_frames // latent_frames))
    oldest_frame = max(sink_frames, boundary * latent_frames - (window_frames - sink_frames))
    ring = range(min(oldest_frame // latent_frames, boundary), boundary)
    return sorted({*range(sink_chunks), *ring})


class History:
    """One session's. The chunks that its window holds are always kept, others while they fit into ``limit_bytes``."""

    def __init__(self, *, latent_frames: int, sink_frames: int, window_frames: int, limit_bytes: int) -> None:
        self._latent_frames = latent_frames
        self._sink_frames = sink_frames
        self._ring_frames = window_frames - sink_frames
        self._sink_chunks = -(-sink_frames // latent_frames)
        self._limit_bytes = limit_bytes
        self._kept: dict[tuple[int, int], KeptChunk] = {}  # by (branch, index)
        self._origin: dict[int, tuple[int, int]] = {0: (0, 0)}  # branch -> the boundary at which it begins
        self._oldest = 0  # of the chunks of the current branch that are kept without a gap up to the newest
        self._others: deque[tuple[int, int]] = deque()  # keys of what the current branch has no use for, first to leave
        self._bytes = 0
        self.branch = 0
        self.next_index = 0

    @property
    def newest(self) -> KeptChunk | None:
        """The newest finished chunk."""
        return self._find(self.branch, self.next_index - 1)

    @property
    def nbytes(self) -> int:
        return self._bytes

    def add(self, chunk: KeptChunk) -> None:
        """The session has finished ``chunk``. Others leave for it, those of other branches and the oldest first.

        One that does not follow the newest begins a history of its own.
        """
        if chunk.index != self.next_index:
            self.clear()
            self.next_index = self._oldest = chunk.index
        self._kept[self.branch, chunk.index] = chunk
        self._bytes += chunk.nbytes
        self.next_index += 1
        self._make_room()

    def window(self) -> list[KeptChunk]:
        """The chunks of which the window has frames, in order."""
        return self._window_at(self.branch, self.next_index)

    def _window_at(self, branch: int, boundary: int) -> list[KeptChunk]:
        """The same at another boundary."""
        indices = window_indices(
            self._latent_frames, self._sink_frames, self._sink_frames + self._ring_frames, boundary
        )
        found = (self._find(branch, index) for index in indices)
        return [chunk for chunk in found if chunk is not None]

    def kept_from(self) -> int:
        """The first boundary of the current branch to which the session can go back."""
        return self._first_boundary(self.branch, self._oldest, self.next_index)

    def _first_boundary(self, branch: int, oldest: int, last: int) -> int:
        """Of a branch that ends at ``last`` and has all chunks from ``oldest`` on. Beyond ``last``: there is none."""
        if any(self._find(branch, index) is None for index in range(min(self._sink_chunks, last))):
            return last + 1
        # Before chunk 0 nothing is missing. Later windows need what the ring holds; the newest has it always.
        first = 0 if oldest == 0 else oldest - (-self._ring_frames // self._latent_frames)
        return min(first, last) if branch == self.branch else first

    def _boundaries(self, branch: int) -> range:
        """Those of a branch to which the session can go back."""
        last = self._last_boundary(branch)
        oldest = self._oldest if branch == self.branch else self._without_gap(branch, last)
        return range(self._first_boundary(branch, oldest, last), last + 1)

    def _without_gap(self, branch: int, boundary: int) -> int:
        """The oldest chunk before a boundary up to which all are kept."""
        while boundary > 0 and self._find(branch, boundary - 1) is not None:
            boundary -= 1
        return boundary

    def go_back(self, branch: int, boundary: int, *, keep: bool) -> list[KeptChunk]:
        """Sets the session to a boundary of a branch; the chunks of the window there.

        With ``keep`` a new branch begins there. Raises InvalidEvent for a boundary that is not kept, which then changes
        nothing.
        """
        if branch not in self._origin:
            raise InvalidEvent(f"{branch}, expected one of the branches {sorted(self._origin)}", field="branch")
        kept = self._boundaries(branch)
        if boundary not in kept:
            those = f"kept of branch {branch} are {kept[0]} to {kept[-1]}" if kept else f"branch {branch} is not kept"
            raise InvalidEvent(f"{boundary}, {those}", field="chunk")
        window = self._window_at(branch, boundary)
        if keep:
            if len(self._origin) >= MAX_BRANCHES:
                raise InvalidEvent(f"{len(self._origin)} branches are kept, no more can begin", field="branch")
            self.branch = max(self._origin) + 1
            self._origin[self.branch] = (branch, boundary)
        else:
            self._forget(branch, boundary)
            self.branch = branch
        self.next_index = boundary
        self._follow()
        self._make_room()
        return window

    def begin_at(self, chunks: list[KeptChunk], boundary: int) -> None:
        """Takes over the window of a snapshot, as the first branch of this session."""
        self.clear()
        self._kept = {(0, chunk.index): chunk for chunk in chunks}
        self._bytes = sum(chunk.nbytes for chunk in chunks)
        self.branch, self.next_index = 0, boundary
        self._follow()

    def clear(self) -> None:
        self._kept.clear()
        self._others.clear()
        self._origin = {0: (0, 0)}
        self._bytes = self.branch = self.next_index = self._oldest = 0

    def _key(self, branch: int, index: int) -> tuple[int, int]:
        """Of the branch in which the chunk was made."""
        while 0 <= index < self._origin[branch][1]:
            branch = self._origin[branch][0]
        return branch, index

    def _find(self, branch: int, index: int) -> KeptChunk | None:
        return self._kept.get(self._key(branch, index))

    def _follow(self) -> None:
        """The session stands elsewhere: which chunks the current branch has, and which not."""
        self._oldest = self._without_gap(self.branch, self.next_index)
        own = {*range(min(self._sink_chunks, self.next_index)), *range(self._oldest, self.next_index)}
        of_branch = {self._key(self.branch, index) for index in own}
        others = [key for key in self._kept if key not in of_branch]
        # Without its sink a branch is lost as a whole.
        self._others = deque(sorted(others, key=lambda key: (key[1] < self._sink_chunks, key[1])))

    def _last_boundary(self, branch: int) -> int:
        """Where a branch ends."""
        if branch == self.branch:
            return self.next_index
        own = [index + 1 for of, index in self._kept if of == branch]
        return max(own, default=self._origin[branch][1])

    def _forget(self, branch: int, boundary: int) -> None:
        """What came after a boundary of a branch, but for what other branches have in common with it."""
        later = {
            other: start
            for other, (parent, start) in self._origin.items()
            if parent == branch and other != branch and start > boundary
        }
        if later:
            heir = max(later, key=lambda other: later[other])
            for index in range(boundary, later[heir]):
                if (branch, index) in self._kept:
                    self._kept[heir, index] = self._kept.pop((branch, index))
            for other, start in later.items():
                self._origin[other] = (branch, boundary) if other == heir else (heir, start)
        for key in [key for key in self._kept if key[0] == branch and key[1] >= boundary]:
            self._bytes -= self._kept.pop(key).nbytes
        parent, start = self._origin[branch]
        self._origin[branch] = parent, min(start, boundary)

    def _make_room(self) -> None:
        ring = max(self._sink_frames, self.next_index * self._latent_frames - self._ring_frames) // self._latent_frames
        while self._bytes > self._limit_bytes:
            if self._others:
                key = self._others.popleft()
            else:
                index = max(self._oldest, self._sink_chunks)
                if index >= ring:
                    return  # the window is left
                key, self._oldest = self._key(self.branch, index), index + 1
            self._bytes -= self._kept.pop(key).nbytes
