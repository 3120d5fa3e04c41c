"""Going back: what a client asks for between two chunks, and where the camera was at each of them.

The engine keeps the chunks themselves. What is here is small, and is dropped with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.session_state import CameraState, Lens, SentEvent
from lingbot_rt.session.shown import shown

HISTORY_KINDS = ("rewind", "branch", "save")
"""Events of the extension ``history``."""

MAX_BOUNDARIES = 4096
"""Most chunks of a branch that one can go back to; of more, the newest are kept."""

_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants done at the next boundary."""

    kind: Literal["rewind", "branch", "save"]
    event_id: int | None
    chunk: int = 0  # of rewind and branch: the chunk that is to come next
    branch: int = 0  # of them: the one that has it


@dataclass(frozen=True, slots=True)
class Boundary:
    """What the controls were before a chunk, beside what its events changed."""

    camera: CameraState
    lens: Lens | None
    still_chunks: int
    prompt: str  # of the newest chunk
    queued_prompt: str  # in force
    prompt_event: SentEvent | None  # that set it


class Boundaries:
    """The boundaries of every branch of a session."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[int, Boundary]] = {0: {}}

    def remember(self, branch: int, chunk: int, boundary: Boundary) -> None:
        line = self._lines.setdefault(branch, {})
        line[chunk] = boundary
        if len(line) > MAX_BOUNDARIES:
            del line[min(line)]

    def require(self, branch: int, chunk: int, current: int) -> Boundary:
        """Raises InvalidEvent that says which chunks are kept, if that is known here.

        The engine lets go of chunks of other branches than the ``current`` one, and says so when it is asked for them.
        """
        line = self._lines.get(branch)
        if not line:
            have = ", ".join(str(number) for number, kept in self._lines.items() if kept) or "none"
            raise InvalidEvent(f"{branch} is not kept, expected one of the branches that are: {have}", field="branch")
        if chunk not in line:
            those = f": {min(line)} to {max(line)}" if branch == current else ""
            raise InvalidEvent(
                f"{chunk} is not kept, expected a chunk of branch {branch} that is{those}", field="chunk"
            )
        return line[chunk]

    def go_back(self, branch: int, chunk: int, to: int) -> None:
        """``to`` goes on from there: the branch itself, which forgets what came after, or a new one."""
        self._lines[to] = {index: kept for index, kept in self._lines[branch].items() if index <= chunk}

    def forget_before(self, branch: int, chunk: int) -> None:
        """The engine lets go of the oldest chunks first."""
        line = self._lines.get(branch, {})
        for index in [index for index in line if index < chunk]:
            del line[index]


def parse_asked(kind: str, payload: object, event_id: int | None, current: int) -> Asked:
    """A ``rewind``, ``branch`` or ``save`` event. ``current``: the branch of one that names none.

    Raises InvalidEvent that names the field, the value and what is expected.
    """
    if kind == "save":
        return Asked("save", event_id)
    if not isinstance(payload, dict):
        raise InvalidEvent(f'{shown(payload)} is not a map with "chunk"', field=kind)
    chunk = _count(payload.get("chunk"), f"{kind}.chunk", "the number of the chunk to come next")
    branch = current if payload.get("branch") is None else _count(payload["branch"], f"{kind}.branch", "a branch")
    return Asked("rewind" if kind == "rewind" else "branch", event_id, chunk, branch)


def _count(value: object, field: str, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_UINT32:
        raise InvalidEvent(f"{shown(value)}, expected {what}, a whole number from 0 to {_MAX_UINT32}", field=field)
    return value
