"""Keys and poses -> the camera's way, in float64 with running state: a long walk stays exact and costs the same at
every step.

c2w: camera-to-world [4, 4], OpenCV axes (x right, y down, z forward). F latent frames per chunk.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt

from lingbot_rt.session.camera_poses import CameraPose, PosesEvent, step_lengths
from lingbot_rt.session.controls import Keys, Moves
from lingbot_rt.session.session_state import CameraState, Lens, PathTable, rows
from lingbot_rt.shapes import FrameSize, intrinsics

Pose = npt.NDArray[np.float64]

YAW_DEGREES = 6
PITCH_DEGREES = 4
PITCH_LIMIT_DEGREES = 85
STEP = 0.05
"""World units per latent frame."""

_WHOLE_DEGREES = 1e-6
"""Angles of a pose that differ from whole degrees by less are whole: keys then go on exactly."""


class CameraPath:
    """A session's camera: degrees of yaw and pitch, a position, and the longest step taken so far.

    Keys turn by whole degrees, so that angles stay whole until a pose says otherwise.
    """

    def __init__(self) -> None:
        self._yaw: float = 0
        self._pitch: float = 0
        self._roll: float = 0
        self._position = np.zeros(3)
        self._previous: Pose | None = None
        self._longest = 0.0
        self._path: PosesEvent | None = None  # the one followed last
        self._placement: Pose | None = None  # of that path in the session's coordinates; None: it is in them

    @property
    def pose(self) -> Pose:
        """Where the camera is now, c2w [4, 4]."""
        pose = np.eye(4)
        pose[:3, :3] = _yaw_matrix(self._yaw) @ _pitch_matrix(self._pitch)
        if self._roll:
            pose[:3, :3] = pose[:3, :3] @ _roll_matrix(self._roll)
        pose[:3, 3] = self._position
        return pose

    @property
    def previous(self) -> Pose | None:
        """The pose of the newest latent frame; None before the first."""
        return self._previous

    def state(self, paths: PathTable) -> CameraState:
        """Where it is. The path it follows is told only if ``paths`` holds it, because frames of it wait."""
        is_followed = paths.holds(self._path)
        return CameraState(
            yaw=self._yaw,
            pitch=self._pitch,
            roll=self._roll,
            position=cast(tuple[float, float, float], tuple(self._position.tolist())),
            previous=None if self._previous is None else rows(self._previous),
            longest=self._longest,
            path=paths.place_of(self._path) if self._path is not None and is_followed else None,
            placement=rows(self._placement) if self._placement is not None and is_followed else None,
        )

    @classmethod
    def restored(cls, state: CameraState, paths: PathTable) -> CameraPath:
        """Raises InvalidInit for a path that ``paths`` does not have."""
        it = cls()
        it._yaw, it._pitch, it._roll = state.yaw, state.pitch, state.roll
        it._position = np.array(state.position, np.float64)
        it._previous = None if state.previous is None else np.array(state.previous, np.float64)
        it._longest = state.longest
        it._path = None if state.path is None else paths.at(state.path)
        it._placement = None if state.placement is None else np.array(state.placement, np.float64)
        return it

    def extend(self, moves: Moves) -> Pose:
        """Moves the camera by one latent frame an entry; returns each pose relative to the one before it, [F, 4, 4].

        The first pose of a session has none before it: identity. Translations are divided by the longest one of the
        whole session so far, this chunk included, or by the longest step that a path states.
        """
        relative, positions = np.empty((len(moves), 4, 4)), np.empty((len(moves), 3))
        for i, move in enumerate(moves):
            if isinstance(move, CameraPose):
                pose = self._follow(move)
            else:
                self._step(move)
                pose = self.pose
            relative[i] = np.eye(4) if self._previous is None else invert(self._previous) @ pose
            positions[i] = pose[:3, 3]
            self._previous = pose
        lengths = step_lengths(relative[:, :3, 3], positions)
        self._longest = max(self._longest, float(lengths.max(initial=0.0)))
        if self._longest > 0:
            relative[:, :3, 3] /= self._longest
        return relative

    def _step(self, keys: Keys) -> None:
        held = set(keys)
        # Kept within one turn: no rounding gathers however long the walk is.
        self._yaw = (self._yaw + YAW_DEGREES * (("l" in held) - ("j" in held))) % 360
        pitch = self._pitch + PITCH_DEGREES * (("i" in held) - ("k" in held))
        # A pose may have left the camera above the limit: from there it can turn back.
        if abs(pitch) <= PITCH_LIMIT_DEGREES or abs(pitch) < abs(self._pitch):
            self._pitch = pitch
        rotation = self.pose[:3, :3]
        along = ("w" in held) - ("s" in held)
        across = ("d" in held) - ("a" in held)
        self._position = self._position + STEP * (along * _flat(rotation[:, 2]) + across * _flat(rotation[:, 0]))

    def _follow(self, move: CameraPose) -> Pose:
        """Puts the camera where the path says. Keys go on from there."""
        path = move.path
        if path is not self._path:
            self._path = path
            self._placement = self.pose @ invert(path.poses[0]) if path.anchor == "camera" else None
            self._longest = max(self._longest, path.longest_step)
        pose: Pose = path.poses[move.index] if self._placement is None else self._placement @ path.poses[move.index]
        self._yaw, self._pitch, self._roll = _angles(pose[:3, :3])
        self._position = pose[:3, 3].copy()
        return pose


class CameraLens:
    """The intrinsics of a session. Those of a path stay in force until the next path."""

    def __init__(self, size: FrameSize) -> None:
        self._size = size
        self._own = np.array(intrinsics(size))
        self._in_force: npt.NDArray[np.float64] | None = None

    @property
    def state(self) -> Lens | None:
        """That of the newest path; None before any."""
        return None if self._in_force is None else cast(Lens, tuple(self._in_force.tolist()))

    @classmethod
    def restored(cls, size: FrameSize, state: Lens | None) -> CameraLens:
        it = cls(size)
        it._in_force = None if state is None else np.array(state, np.float64)
        return it

    def extend(self, moves: Moves) -> npt.NDArray[np.float64] | None:
        """(fx, fy, cx, cy) of each latent frame in pixels of the session, [F, 4]; None: the model's own for all."""
        frames = []
        for move in moves:
            if isinstance(move, CameraPose):
                self._in_force = move.path.intrinsics_at(move.index, self._size)
            frames.append(self._in_force)
        if all(each is None for each in frames):
            return None
        return np.stack([self._own if each is None else each for each in frames])


def invert(pose: Pose) -> Pose:
    """The inverse of a rigid [4, 4] pose."""
    inverse = np.eye(4)
    inverse[:3, :3] = pose[:3, :3].T
    inverse[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return inverse


def _flat(direction: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``direction`` on the ground, of length 1 (short by the reference's 1e-6)."""
    flat = np.array([direction[0], 0.0, direction[2]])
    return flat / (np.linalg.norm(flat) + 1e-6)


def _angles(rotation: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Degrees of yaw, pitch and roll whose matrices, in this order, make ``rotation`` [3, 3]."""
    pitch = math.atan2(-rotation[1, 2], math.hypot(rotation[0, 2], rotation[2, 2]))
    if math.cos(pitch) > 1e-9:
        yaw, roll = math.atan2(rotation[0, 2], rotation[2, 2]), math.atan2(rotation[1, 0], rotation[1, 1])
    else:  # straight up or down: yaw and roll turn about the same axis
        yaw, roll = math.atan2(-rotation[2, 0], rotation[0, 0]), 0.0
    return _degrees(yaw) % 360, _degrees(pitch), _degrees(roll)


def _degrees(radians: float) -> float:
    degrees = math.degrees(radians)
    return round(degrees) if abs(degrees - round(degrees)) < _WHOLE_DEGREES else degrees


def _yaw_matrix(degrees: float) -> Pose:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _pitch_matrix(degrees: float) -> Pose:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _roll_matrix(degrees: float) -> Pose:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
