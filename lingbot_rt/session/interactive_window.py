"""The interactive window: a chunk sees fewer of the latest frames while the camera moves, and fewer still at rest.

The sink and the chunk itself are always seen. The numbers are the reference's. A window is never enlarged for them.
"""

from __future__ import annotations

import numpy as np

from lingbot_rt.session.camera_path import Pose

MOVING_FRAMES = 12
"""Latent frames before a chunk that it sees while the camera moves."""

STILL_FRAMES = 3
"""The same from the second still chunk on."""

AT_REST_AFTER = 2
"""Still chunks in a row after which the camera counts as at rest, the current one among them."""

_STILL = 1e-9
"""Poses that differ by less are the same: what is left of a rotation times its inverse."""


def recent_frames(sink_frames: int, window_frames: int, latent_frames: int) -> tuple[int, int]:
    """Latent frames before a chunk that a session of this window sees: (still, moving)."""
    most = window_frames - sink_frames - latent_frames
    return min(STILL_FRAMES, most), min(MOVING_FRAMES, most)


class InteractiveWindow:
    """How many latent frames before it each chunk of a session sees. ``recent``: (still, moving), or empty for all."""

    def __init__(self, recent: tuple[int, ...], still_chunks: int = 0) -> None:
        self._recent = recent
        self.still_chunks = still_chunks  # in a row, up to the newest chunk

    def next(self, relative_poses: Pose | None) -> int | None:
        """For the chunk with these poses [F, 4, 4]; None: all of the window, as without camera control."""
        if not self._recent or relative_poses is None:
            return None
        is_still = np.allclose(relative_poses, np.eye(4), rtol=0, atol=_STILL)
        self.still_chunks = self.still_chunks + 1 if is_still else 0
        still, moving = self._recent
        return still if self.still_chunks >= AT_REST_AFTER else moving
