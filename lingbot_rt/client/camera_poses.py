"""Camera paths as researchers keep them, one pose per pixel frame, made into the payload of ``camera_poses``.

A folder of LingBot-World's own examples has poses.npy [n, 4, 4], c2w with OpenCV axes, and intrinsics.npy [n, 4],
(fx, fy, cx, cy) in pixels of a picture of 832x480.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lingbot_rt.errors import EventRefused, InvalidEvent, quoted, reason_of
from lingbot_rt.session.camera_poses import longest_step, parse_poses
from lingbot_rt.session.controls import MAX_PENDING
from lingbot_rt.session.messages import WIRE_SIZE
from lingbot_rt.shapes import VAE_TEMPORAL_STRIDE

POSES_NAME = "poses.npy"
INTRINSICS_NAME = "intrinsics.npy"


def poses_payload(
    poses: npt.ArrayLike,
    intrinsics: npt.ArrayLike | None = None,
    *,
    size: str = WIRE_SIZE,
    anchor: str = "camera",
    every: int = VAE_TEMPORAL_STRIDE,
) -> dict[str, Any]:
    """The payload of an event ``camera_poses``, also for ``condition_inputs`` of an init.

    ``poses``: c2w [n, 4, 4], OpenCV axes, one per pixel frame. Every fourth one is the pose of a latent frame, from the
    first on; ``every=1`` takes poses that are one per latent frame already. ``intrinsics``: (fx, fy, cx, cy), [4] or at
    least [n, 4], in pixels of pictures of ``size``; None: the model's own. ``anchor``: "camera" puts the first pose
    where the camera is, "session" takes the poses as coordinates of the session. As in LingBot-World's camera
    utilities, the longest step of the whole path becomes 1.

    Warns where a rotation is replaced by the nearest one. Raises EventRefused for what a server would refuse.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise EventRefused(
            f"every: {quoted(str(every))}, expected pixel frames per latent frame: 1 or more", field="every"
        )
    path = _array(poses, "camera_poses.poses")
    fields: dict[str, Any] = {"poses": path[::every].tolist(), "anchor": anchor}
    if intrinsics is not None:
        lens = _array(intrinsics, "camera_poses.intrinsics")
        if lens.ndim == 2 and lens.shape[0] != 1:
            if len(lens) < len(path):
                raise EventRefused(
                    f"invalid event: camera_poses.intrinsics: {len(lens)} rows for {len(path)} poses, expected as many",
                    field="camera_poses.intrinsics",
                )
            lens = lens[: len(path) : every]
        is_constant = lens.ndim == 2 and bool(np.all(lens == lens[0]))
        fields |= {"intrinsics": (lens[0] if is_constant else lens).tolist(), "size": str(size)}
    try:
        event = parse_poses(fields, MAX_PENDING)
    except InvalidEvent as error:
        is_of_frames = "poses.poses" in error.described or "][" in error.described
        rows = f" (latent frame i is pose {every} i)" if every > 1 and is_of_frames else ""
        raise EventRefused(f"{error.described}{rows}", field=error.field) from None
    for notice in event.notices:
        warnings.warn(f"{notice.field}: {notice.text}", stacklevel=3)
    return event.payload | {"longest_step": longest_step(event.poses)}


def read_poses(path: str | Path, intrinsics: str | Path | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """poses.npy and intrinsics.npy as arrays, for ``poses_payload`` and ``Session.follow``.

    ``path``: a file, or a folder with poses.npy and perhaps intrinsics.npy. Raises EventRefused for a file that is
    missing or no array.
    """
    place = Path(path)
    if place.is_dir():
        if intrinsics is None and (place / INTRINSICS_NAME).exists():
            intrinsics = place / INTRINSICS_NAME
        place /= POSES_NAME
    return _read(place), None if intrinsics is None else _read(Path(intrinsics))


def _read(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise EventRefused(f"{quoted(str(file))}: {reason_of(error)}, expected a NumPy file (.npy)") from None
    except (ValueError, EOFError, MemoryError):  # NumPy's own text would advise to load it unsafely
        raise EventRefused(f"{quoted(str(file))}: expected a NumPy file (.npy) of numbers") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise EventRefused(f"{quoted(str(file))}: a file of several arrays, expected a NumPy file (.npy) of one")
    return array


def _array(values: npt.ArrayLike, field: str) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(values)
        if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
            raise ValueError
    except ValueError:
        array = np.zeros(0)
    expected = ("[n, 4, 4]",) if field.endswith("poses") else ("[4]", "[n, 4]")
    shapes = {"[n, 4, 4]": array.ndim == 3 and array.shape[1:] == (4, 4), "[4]": array.shape == (4,)}
    shapes["[n, 4]"] = array.ndim == 2 and array.shape[1] == 4 and len(array) > 0
    if not any(shapes[form] for form in expected):
        shape = list(np.shape(values)) if array.size else "no numbers"
        raise EventRefused(
            f"invalid event: {field}: an array of shape {shape}, expected numbers of {' or '.join(expected)}",
            field=field,
        )
    return array.astype(np.float64)
