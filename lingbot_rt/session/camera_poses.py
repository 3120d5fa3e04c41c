"""Camera poses as clients send them: the matrices of a path, checked, and the lens that they were made for.

c2w: camera-to-world [4, 4], OpenCV axes (x right, y down, z forward). n poses, one per latent frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.shown import shown
from lingbot_rt.shapes import FrameSize

Array = npt.NDArray[np.float64]

ROTATION_TOLERANCE = 1e-3
"""A rotation R with max |R^T R - I| above it is replaced by the nearest one, and the client hears of it."""

_EXACT = 1e-9
"""Rotations that are orthonormal to this are used bit for bit."""

_MIN_DETERMINANT = 1e-9
"""Matrices below it are mirror images, or flat: no rotation is near."""

_LAST_ROW = (0.0, 0.0, 0.0, 1.0)

MAX_COORDINATE = 1_000_000
"""Largest number of a pose, of an intrinsic and of a position, either sign."""

MAX_STEP = 1000.0
"""Farthest way between the poses of two latent frames, in world units."""

_ROUNDING = 1e-9
"""Steps shorter than this, relative to the position, are the rounding of a camera that stands still."""

ANCHORS = ("session", "camera")
"""Where a path lies: in the coordinates of the session, or so that its first pose is where the camera is."""

_FORM = 'a list of matrices [4][4], or a map with "poses"'


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that was taken, but not as it was sent."""

    field: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class PosesEvent:
    """A path of n poses for the coming latent frames."""

    poses: Array  # c2w [n, 4, 4] with exact rotations
    intrinsics: Array | None = None  # (fx, fy, cx, cy) [4], or [n, 4], in pixels of `size`; None: the model's own lens
    size: FrameSize | None = None  # of the pictures that the intrinsics are for; None: the session's
    anchor: str = "session"  # one of ANCHORS
    longest_step: float = 0.0  # world units that count as the longest step of the session so far; 0: not stated
    notices: tuple[Notice, ...] = ()

    @property
    def moves(self) -> tuple[CameraPose, ...]:
        """One entry per latent frame."""
        return tuple(CameraPose(self, index) for index in range(len(self.poses)))

    @property
    def payload(self) -> dict[str, Any]:
        """The payload that parses to this event again."""
        fields: dict[str, Any] = {"poses": self.poses.tolist(), "anchor": self.anchor}
        if self.intrinsics is not None:
            fields["intrinsics"] = self.intrinsics.tolist()
        if self.size is not None:
            fields["size"] = str(self.size)
        if self.longest_step:
            fields["longest_step"] = self.longest_step
        return fields

    def intrinsics_at(self, index: int, size: FrameSize) -> Array | None:
        """(fx, fy, cx, cy) of one pose in pixels of frames of ``size``; None: the model's own."""
        if self.intrinsics is None:
            return None
        given = self.size or size
        scale = np.array([size.width / given.width, size.height / given.height] * 2)
        return (self.intrinsics if self.intrinsics.ndim == 1 else self.intrinsics[index]) * scale


@dataclass(frozen=True, slots=True, eq=False)
class CameraPose:
    """One latent frame of a path."""

    path: PosesEvent
    index: int


def parse_poses(value: object, max_poses: int, field: str = "camera_poses") -> PosesEvent:
    """The payload of ``camera_poses`` -> a path. Raises InvalidEvent that names the place, the value and the fix."""
    if not isinstance(value, list | tuple | Mapping):
        raise InvalidEvent(f"{shown(value)} is not {_FORM}", field=field)
    fields: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"poses": value}
    if fields.get("poses") is None:
        raise InvalidEvent(f"{shown(value)} is not {_FORM}", field=field)
    poses, notices = _poses(fields["poses"], max_poses, f"{field}.poses")
    anchor = "session" if fields.get("anchor") is None else fields["anchor"]
    if anchor not in ANCHORS:
        raise InvalidEvent(f"{shown(anchor)}, expected one of {', '.join(ANCHORS)}", field=f"{field}.anchor")
    return PosesEvent(
        poses=poses,
        intrinsics=_intrinsics(fields.get("intrinsics"), len(poses), f"{field}.intrinsics"),
        size=_size(fields.get("size"), f"{field}.size"),
        anchor=anchor,
        longest_step=_longest_step(fields.get("longest_step"), f"{field}.longest_step"),
        notices=notices,
    )


def step_lengths(steps: Array, positions: Array) -> Array:
    """World units of ``steps`` [n, 3] that lead to ``positions`` [n, 3]; 0 where it is only rounding: [n]."""
    lengths = np.linalg.norm(steps, axis=-1)
    return np.where(lengths < _ROUNDING * (1 + np.linalg.norm(positions, axis=-1)), 0.0, lengths)


def longest_step(poses: Array) -> float:
    """World units of the longest step of a path [n, 4, 4]; 0 if it stands still."""
    positions = poses[:, :3, 3]
    return float(step_lengths(np.diff(positions, axis=0), positions[1:]).max(initial=0.0))


def require_steps(poses: Array, field: str, before: Array | None = None) -> None:
    """Raises InvalidEvent if two poses of [n, 4, 4] that follow each other are too far apart.

    ``before``: the pose of the camera that the first one follows, if it follows one.
    """
    positions = poses[:, :3, 3] if before is None else np.concatenate([before[None, :3, 3], poses[:, :3, 3]])
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=-1)
    if not (steps > MAX_STEP).any():
        return
    index = int(np.argmax(steps > MAX_STEP))
    step = f"{steps[index]:.6g} units"
    if before is not None and index == 0:
        raise InvalidEvent(
            f"{step} from the camera, expected at most {MAX_STEP:g} per latent frame; "
            'anchor "camera" lets a path begin where the camera is',
            field=f"{field}[0]",
        )
    index += before is None
    raise InvalidEvent(
        f"{step} from the pose before it, expected at most {MAX_STEP:g} per latent frame; "
        "divide all translations by the same number, they are relative to the longest step",
        field=f"{field}[{index}]",
    )


def _poses(value: object, max_poses: int, field: str) -> tuple[Array, tuple[Notice, ...]]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= max_poses:
        what = f"{len(value)} matrices" if isinstance(value, list | tuple) else shown(value)
        raise InvalidEvent(f"{what}, expected 1 to {max_poses} matrices [4][4], one per latent frame", field=field)
    poses = _numbers(value, (len(value), 4, 4), field)
    wrong = np.abs(poses[:, 3] - _LAST_ROW).max(axis=-1) > ROTATION_TOLERANCE
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InvalidEvent(
            f"{shown(list(value[index][3]))}, expected [0, 0, 0, 1]: the position is the last column, not the last row",
            field=f"{field}[{index}][3]",
        )
    poses[:, 3] = _LAST_ROW
    notices = _make_exact(poses, field)
    require_steps(poses, field)
    return poses, notices


def _make_exact(poses: Array, field: str) -> tuple[Notice, ...]:
    """Replaces the rotations of [n, 4, 4] that are not exact by the nearest ones, in place."""
    rotations = poses[:, :3, :3]
    mirrored = np.linalg.det(rotations) < _MIN_DETERMINANT
    if mirrored.any():
        index = int(np.argmax(mirrored))
        raise InvalidEvent(
            f"the upper left 3x3 has the determinant {np.linalg.det(rotations[index]):.3g}, expected a rotation (1): "
            "OpenCV axes, x right, y down, z forward",
            field=f"{field}[{index}]",
        )
    error = np.abs(rotations.swapaxes(1, 2) @ rotations - np.eye(3)).max(axis=(1, 2))
    inexact = error > _EXACT
    if inexact.any():
        left, _, right = np.linalg.svd(rotations[inexact])
        poses[inexact, :3, :3] = left @ right
    bad = error > ROTATION_TOLERANCE
    if not bad.any():
        return ()
    first = int(np.argmax(bad))
    text = (
        f"the rotation is orthonormal to {error[first]:.2g} only, expected {ROTATION_TOLERANCE:g}: "
        f"the nearest rotation is used, for {int(bad.sum())} of {len(poses)} poses"
    )
    return (Notice(f"{field}[{first}]", text),)


def _intrinsics(value: object, num_poses: int, field: str) -> Array | None:
    if value is None:
        return None
    is_per_pose = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], list | tuple)
    if is_per_pose and isinstance(value, list | tuple) and len(value) != num_poses:
        raise InvalidEvent(
            f"{len(value)} rows for {num_poses} poses, expected 4 numbers, or one row of 4 per pose", field=field
        )
    given = _numbers(value, (num_poses, 4) if is_per_pose else (4,), field)
    low = np.array([1.0, 1.0, 0.0, 0.0])
    wrong = (given < low) | ((given <= 0) & (low == 0))
    if wrong.any():
        place = tuple(int(at) for at in np.argwhere(wrong)[0])
        name, expected = ("fx", "fy", "cx", "cy")[place[-1]], "1 or more" if place[-1] < 2 else "above 0"
        raise InvalidEvent(
            f"{name} is {given[place]:g}, expected pixels, {expected}; state the size of the pictures as size",
            field=field + "".join(f"[{at}]" for at in place),
        )
    return given


def _size(value: object, field: str) -> FrameSize | None:
    if value is None:
        return None
    try:
        size = FrameSize.parse(value) if isinstance(value, str) else None
    except ValueError:
        size = None
    if size is None or min(size.width, size.height) < 1:
        raise InvalidEvent(
            f"{shown(value)}, expected WIDTHxHEIGHT of the pictures that the intrinsics are for, such as 832x480",
            field=field,
        )
    return size


def _longest_step(value: object, field: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_STEP:
        raise InvalidEvent(f"{shown(value)}, expected world units from 0 to {MAX_STEP:g}", field=field)
    return float(value)


def _numbers(value: Any, shape: Sequence[int], field: str) -> Array:
    """Nested lists of ``shape`` -> float64. Raises InvalidEvent that names the first place that is wrong."""
    items = [value]
    for size in shape:
        if not all(isinstance(item, list | tuple) and len(item) == size for item in items):
            items = []
            break
        items = list(chain.from_iterable(items))
    if items and set(map(type, items)) <= {int, float}:
        numbers = np.array(items, np.float64).reshape(shape)
        if (np.abs(numbers) <= MAX_COORDINATE).all():
            return numbers
    _check_numbers(value, shape, field)  # slower: place by place, and for numbers of other types
    return np.array(value, np.float64)


def _check_numbers(value: Any, shape: Sequence[int], field: str) -> None:
    if not shape:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_COORDINATE:
            raise InvalidEvent(
                f"{shown(value)}, expected a finite number, at most {MAX_COORDINATE:,} either way", field=field
            )
        return
    if not isinstance(value, list | tuple) or len(value) != shape[0]:
        rows = f"{shape[0]} rows of {shape[1]} numbers" if len(shape) > 1 else f"{shape[0]} numbers"
        raise InvalidEvent(f"{shown(value)}, expected {rows}", field=field)
    for index, item in enumerate(value):
        _check_numbers(item, shape[1:], f"{field}[{index}]")
