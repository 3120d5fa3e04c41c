"""Keys -> camera poses, in float64 with running state: a long walk stays exact and costs the same at every step.

c2w: camera-to-world [4, 4], OpenCV axes (x right, y down, z forward). F latent frames per chunk.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lingbot_rt.session.controls import Actions, Keys

Pose = npt.NDArray[np.float64]

YAW_DEGREES = 6
PITCH_DEGREES = 4
PITCH_LIMIT_DEGREES = 85
STEP = 0.05
"""World units per latent frame."""


class CameraPath:
    """A session's camera: whole degrees of yaw and pitch, a position, and the longest step taken so far."""

    def __init__(self) -> None:
        self._yaw = 0
        self._pitch = 0
        self._position = np.zeros(3)
        self._previous: Pose | None = None
        self._longest = 0.0

    @property
    def pose(self) -> Pose:
        """Where the camera is now, c2w [4, 4]."""
        pose = np.eye(4)
        pose[:3, :3] = _yaw_matrix(self._yaw) @ _pitch_matrix(self._pitch)
        pose[:3, 3] = self._position
        return pose

    def extend(self, actions: Actions) -> Pose:
        """Walks one latent frame an entry; returns each pose relative to the one before it, [F, 4, 4].

        The first pose of a session has none before it: identity. Translations are divided by the longest one of the
        whole session so far, this chunk included.
        """
        relative = np.empty((len(actions), 4, 4))
        for i, keys in enumerate(actions):
            self._step(keys)
            pose = self.pose
            relative[i] = np.eye(4) if self._previous is None else invert(self._previous) @ pose
            self._previous = pose
        lengths = np.linalg.norm(relative[:, :3, 3], axis=-1)
        self._longest = max(self._longest, float(lengths.max(initial=0.0)))
        if self._longest > 0:
            relative[:, :3, 3] /= self._longest
        return relative

    def _step(self, keys: Keys) -> None:
        held = set(keys)
        # Whole degrees, kept within one turn: no rounding gathers however long the walk is.
        self._yaw = (self._yaw + YAW_DEGREES * (("l" in held) - ("j" in held))) % 360
        pitch = self._pitch + PITCH_DEGREES * (("i" in held) - ("k" in held))
        if abs(pitch) <= PITCH_LIMIT_DEGREES:
            self._pitch = pitch
        rotation = self.pose[:3, :3]
        along = ("w" in held) - ("s" in held)
        across = ("d" in held) - ("a" in held)
        self._position = self._position + STEP * (along * _flat(rotation[:, 2]) + across * _flat(rotation[:, 0]))


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


def _yaw_matrix(degrees: int) -> Pose:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _pitch_matrix(degrees: int) -> Pose:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
