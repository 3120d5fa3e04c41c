"""What a session is between two chunks, as data: what JSON can hold, and what is checked when it comes back.

A file with such a state may come from a client. Whatever it holds, ``SessionState`` is taken whole or refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session.camera_poses import CameraPose, PosesEvent, parse_poses

MAX_FRAMES = 512
"""Most latent frames of a script or path, and most transitions: ``controls.MAX_PENDING``."""

MAX_EVENTS = 1024
"""Most events that wait: ``controls.MAX_WAITING``."""

_MAX_PROMPT = 8192
_MAX_POSITION = 10**12
_NEAR_ROTATION = 1e-3

Count = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[float, Meta(ge=-_MAX_POSITION, le=_MAX_POSITION)]
Row = tuple[Number, Number, Number, Number]
Matrix = tuple[Row, Row, Row, Row]
Prompt = Annotated[str, Meta(min_length=1, max_length=_MAX_PROMPT)]
Key = Literal["w", "a", "s", "d", "i", "j", "k", "l"]


class SentEvent(msgspec.Struct, frozen=True, array_like=True):
    """An event of a client, without the time of its arrival: clocks differ between two processes."""

    order: Count
    event_id: Count | None


class FrameState(msgspec.Struct, frozen=True, array_like=True):
    """What moves the camera in one latent frame: keys, or one pose of a path of the table."""

    event: SentEvent | None
    keys: tuple[Key, ...]
    path: Annotated[int, Meta(ge=0, le=1)] | None = None
    index: Annotated[int, Meta(ge=0, lt=MAX_FRAMES)] = 0


class WaitingState(msgspec.Struct, frozen=True, array_like=True):
    """An event that no chunk has sampled yet."""

    event: SentEvent
    is_prompt: bool


class NextPrompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that waits for the next chunk."""

    prompt: Prompt
    recache: bool | None
    event: SentEvent


Frames = Annotated[tuple[FrameState, ...], Meta(max_length=MAX_FRAMES)]


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """Of ``controls.ConditionQueue``."""

    prompt: Prompt
    prompt_event: SentEvent | None
    next_prompt: NextPrompt | None
    script: Frames
    transitions: Frames
    held: FrameState | None
    keys_event: SentEvent | None
    newest_keys: Annotated[int, Meta(ge=-1, le=2**53)]
    waiting: Annotated[tuple[WaitingState, ...], Meta(max_length=MAX_EVENTS)]
    num_received: Count
    num_samples: Count


class CameraState(msgspec.Struct, frozen=True, kw_only=True):
    """Of ``camera_path.CameraPath``. A path is there only while frames of it wait."""

    yaw: Number
    pitch: Number
    roll: Number
    position: tuple[Number, Number, Number]
    previous: Matrix | None
    longest: Annotated[float, Meta(ge=0, le=_MAX_POSITION)]
    path: Annotated[int, Meta(ge=0, le=1)] | None = None
    placement: Matrix | None = None


Lens = tuple[
    Annotated[float, Meta(gt=0, le=_MAX_POSITION)],
    Annotated[float, Meta(gt=0, le=_MAX_POSITION)],
    Annotated[float, Meta(gt=0, le=_MAX_POSITION)],
    Annotated[float, Meta(gt=0, le=_MAX_POSITION)],
]
"""fx, fy, cx, cy in pixels."""


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """Of ``session.Session``: everything that does not follow from its init."""

    next_index: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    branch: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    prompt: Prompt  # of the newest chunk
    is_paused: bool
    still_chunks: Count
    lens: Lens | None
    camera: CameraState
    queue: QueueState
    paths: Annotated[tuple[dict[str, Any], ...], Meta(max_length=2)]  # payloads of camera_poses


def parsed(state: object) -> SessionState:
    """Builtins -> the state. Raises InvalidInit with the field ``resume``."""
    try:
        found = msgspec.convert(state, SessionState)
    except msgspec.ValidationError as error:
        raise InvalidInit(f"the saved controls are damaged: {str(error)[:200]}", field="resume") from None
    for matrix in (found.camera.previous, found.camera.placement):
        if matrix is not None and not _is_pose(np.array(matrix)):
            raise InvalidInit("the saved controls are damaged: a pose of the camera is no rotation", field="resume")
    return found


class PathTable:
    """The paths that a state refers to, by their place in ``SessionState.paths``."""

    def __init__(self, paths: Iterable[PosesEvent] = ()) -> None:
        self.paths = list(paths)

    @classmethod
    def of_payloads(cls, payloads: Iterable[dict[str, Any]]) -> PathTable:
        """Raises InvalidInit with the field ``resume``."""
        try:
            return cls(parse_poses(payload, MAX_FRAMES) for payload in payloads)
        except InvalidEvent as error:
            raise InvalidInit(f"the saved path is damaged: {error.field}: {error}", field="resume") from None

    def place_of(self, path: PosesEvent) -> int:
        """Adds it if it is not there. Two paths are the same only if they are one object."""
        for place, known in enumerate(self.paths):
            if known is path:
                return place
        self.paths.append(path)
        return len(self.paths) - 1

    def holds(self, path: PosesEvent | None) -> bool:
        return any(known is path for known in self.paths)

    def at(self, place: int) -> PosesEvent:
        """Raises InvalidInit with the field ``resume``."""
        if place >= len(self.paths):
            raise InvalidInit(f"the saved controls are damaged: there is no path {place}", field="resume")
        return self.paths[place]

    def pose(self, place: int, index: int) -> CameraPose:
        """Raises InvalidInit with the field ``resume``."""
        path = self.at(place)
        if index >= len(path.poses):
            raise InvalidInit(f"the saved controls are damaged: path {place} has no pose {index}", field="resume")
        return CameraPose(path, index)


def rows(matrix: npt.NDArray[np.float64]) -> Any:
    """A matrix [4, 4] as a state holds it: its numbers come back bit for bit."""
    return tuple(tuple(row) for row in matrix.tolist())


def _is_pose(matrix: npt.NDArray[np.float64]) -> bool:
    rotation = matrix[:3, :3]
    return bool(
        (np.abs(rotation @ rotation.T - np.eye(3)) < _NEAR_ROTATION).all() and np.linalg.det(rotation) > 0
    ) and bool((matrix[3] == (0, 0, 0, 1)).all())
