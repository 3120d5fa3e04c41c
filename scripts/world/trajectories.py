"""Random camera trajectories through the world, made by the camera of the serving code.

n latent frames, T = 4 (n - 1) + 1 pixel frames. A session's first latent frame is the start picture; the keys of that
frame move nothing, neither here nor in the ray maps. Position and angles of pixel frames are interpolated linearly
between latent frames. There are no collisions: a landmark sinks into the ground when the camera comes near, so that
every position has a view and every key an effect.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lingbot_rt.session.camera_path import PITCH_DEGREES, PITCH_LIMIT_DEGREES, YAW_DEGREES, CameraPath
from lingbot_rt.session.controls import NEUTRAL, Actions, Keys
from lingbot_rt.shapes import VAE_TEMPORAL_STRIDE
from scripts.world.config import CHUNK_FRAMES
from scripts.world.scene import EYE_HEIGHT, LANDMARKS, PERIOD

Array = npt.NDArray[np.float64]

SINGLE_KEYS: tuple[Keys, ...] = (NEUTRAL, *((key,) for key in "wasdijkl"))
"""No key, and each key alone: the nine actions of the obedience measurement."""

_AXES = ("ws", "ad", "jl", "ik")
KEY_PAIRS: tuple[Keys, ...] = tuple(
    (a, b) for one, other in itertools.combinations(_AXES, 2) for a in one for b in other
)
TYPICAL_PITCH_DEGREES = 28
"""Limit of the pitch in nine of ten trajectories; the tenth uses the camera's own limit."""


@dataclass(frozen=True, slots=True)
class View:
    """Positions and angles (degrees) of a camera in the world, one entry per frame."""

    x: Array
    z: Array
    yaw: Array
    pitch: Array

    def poses(self) -> Array:
        """c2w [n, 4, 4]."""
        pose = np.zeros((len(self.x), 4, 4))
        yaw, pitch = np.radians(self.yaw), np.radians(self.pitch)
        cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        zero, one = np.zeros_like(cy), np.ones_like(cy)
        pose[:, 0] = np.stack([cy, sy * sp, sy * cp, self.x], -1)
        pose[:, 1] = np.stack([zero, cp, -sp, zero - EYE_HEIGHT], -1)
        pose[:, 2] = np.stack([-sy, cy * sp, cy * cp, self.z], -1)
        pose[:, 3] = np.stack([zero, zero, zero, one], -1)
        return pose

    def as_rows(self) -> Array:
        """[n, 4]: x, z, yaw, pitch."""
        return np.stack([self.x, self.z, self.yaw, self.pitch], -1)

    def at(self, i: int) -> View:
        """The view of frame ``i``."""
        return View(*(values[[i]] for values in (self.x, self.z, self.yaw, self.pitch)))

    def pixel_frames(self) -> View:
        """The views of the pixel frames, if these are the views of the latent frames."""
        stride = VAE_TEMPORAL_STRIDE
        steps = np.arange(stride * (len(self.x) - 1) + 1) / stride
        return View(
            *(np.interp(steps, np.arange(len(self.x)), values) for values in (self.x, self.z, self.yaw, self.pitch))
        )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The camera of one session."""

    actions: Actions
    relative: Array  # [n, 4, 4], scaled chunk by chunk as in serving: the input of the ray maps
    view: View  # of the latent frames


def start_view(rng: np.random.Generator, pitch: float = 0.0) -> View:
    """A random position and yaw. The yaw is a whole number of steps, so that all directions of the world are."""
    x, z = rng.uniform(0, PERIOD, 2)
    yaw = YAW_DEGREES * rng.integers(360 // YAW_DEGREES)
    return View(*(np.array([value]) for value in (x, z, yaw, pitch)))


def hiding_view(rng: np.random.Generator) -> View:
    """A level view of a place where a landmark hides in the ground, or is about to, because the viewer is so near. It
    rises when the viewer steps back."""
    landmark = LANDMARKS[rng.integers(len(LANDMARKS))]
    yaw = YAW_DEGREES * rng.integers(360 // YAW_DEGREES)
    distance = landmark.sink_radius * rng.uniform(0.5, 0.9)
    bearing = math.radians(yaw + rng.uniform(-55, 55))  # a picture is 80 degrees wide: some come into view
    x, z = landmark.x - distance * math.sin(bearing), landmark.z - distance * math.cos(bearing)
    return View(*(np.array([value]) for value in (x % PERIOD, z % PERIOD, yaw, 0.0)))


def make_trajectory(start: View, actions: Actions, latent_frames: int = CHUNK_FRAMES) -> Trajectory:
    """``actions`` from ``start``, the view of latent frame 0, in chunks of ``latent_frames``."""
    session, by_frame = CameraPath(), CameraPath()
    relative = np.concatenate(
        [session.extend(actions[i : i + latent_frames]) for i in range(0, len(actions), latent_frames)]
    )
    poses = np.empty((len(actions), 4, 4))
    for i, keys in enumerate(actions):
        by_frame.extend((keys,))
        poses[i] = by_frame.pose
    return Trajectory(actions, relative, place_in_world(start, poses))


def place_in_world(start: View, poses: Array) -> View:
    """Moves a session's poses [n, 4, 4] into the world, so that the first one is ``start``."""
    yaw = np.degrees(np.unwrap(np.arctan2(poses[:, 0, 2], poses[:, 2, 2])))
    pitch = np.degrees(np.arcsin(-poses[:, 1, 2]))
    turn = math.radians(start.yaw[0] - yaw[0])
    dx, dz = poses[:, 0, 3] - poses[0, 0, 3], poses[:, 2, 3] - poses[0, 2, 3]
    c, s = math.cos(turn), math.sin(turn)
    return View(
        start.x[0] + c * dx + s * dz,
        start.z[0] - s * dx + c * dz,
        start.yaw[0] + yaw - yaw[0],
        start.pitch[0] + pitch - pitch[0],
    )


def still_actions(count: int) -> Actions:
    """No key, ever."""
    return (NEUTRAL,) * count


def step_back_actions(rng: np.random.Generator, count: int, long_share: float = 0) -> Actions:
    """No key in the first chunk, then `s` for one to three chunks, then random ones."""
    begin = (NEUTRAL,) * CHUNK_FRAMES + (("s",),) * int(rng.integers(CHUNK_FRAMES, 3 * CHUNK_FRAMES + 1))
    return (begin + random_actions(rng, count, long_share))[:count]


def random_actions(rng: np.random.Generator, count: int, long_share: float = 0) -> Actions:
    """Single keys, pairs of keys and no key, each held for a random time.

    Three in ten spells without a key are long, and ``long_share`` of the others.
    """
    limit = PITCH_LIMIT_DEGREES if rng.random() < 0.1 else TYPICAL_PITCH_DEGREES
    actions: list[Keys] = []
    pitch = 0
    while len(actions) < count:
        kind = rng.random()
        keys = NEUTRAL
        if kind < 0.52:
            keys = SINGLE_KEYS[rng.integers(1, len(SINGLE_KEYS))]
        elif kind < 0.9:
            keys = KEY_PAIRS[rng.integers(len(KEY_PAIRS))]
        held = 1 + int(rng.geometric(0.22))
        share = 0.3 if keys == NEUTRAL else long_share
        if share and rng.random() < share:
            held = int(rng.integers(9, 25))
        for _ in range(held):
            step = PITCH_DEGREES * (("i" in keys) - ("k" in keys))
            if abs(pitch + step) > limit:
                keys = tuple(key for key in keys if key not in "ik")
                step = 0
            pitch += step
            actions.append(keys)
    return tuple(actions[:count])


def branch(view: View, keys: Keys, latent_frames: int) -> View:
    """The one-frame ``view``, then ``latent_frames`` more with ``keys`` held."""
    path = CameraPath()
    poses = [path.pose]
    for _ in range(latent_frames):
        path.extend((keys,))
        poses.append(path.pose)
    return place_in_world(view, np.stack(poses))
