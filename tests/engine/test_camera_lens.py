"""The camera modulation of a session: kept while neither the way nor the lens changes."""

from __future__ import annotations

import numpy as np
import torch

from lingbot_rt.engine.session_state import SessionState


def test_a_camera_that_zooms_at_rest_is_computed_again(pipeline, session_plan):
    """The same poses with another lens give another modulation, the same lens the one that is kept."""
    session = SessionState(pipeline, session_plan({}))
    poses = np.tile(np.eye(4), (3, 1, 1))
    wide, narrow = np.tile([300.0, 300, 32, 32], (3, 1)), np.tile([900.0, 900, 32, 32], (3, 1))
    own = session.camera(poses)
    assert session.camera(poses) is own
    kept = session.camera(poses, wide)
    assert session.camera(poses + 1e-12, wide.copy()) is kept
    first = [tensor.clone() for pair in kept for tensor in pair]

    def copied(lens) -> list[torch.Tensor]:
        return [
            tensor.clone() for pair in session.camera(poses, lens) for tensor in pair
        ]  # the next is written over it

    others = [copied(lens) for lens in (narrow, None, wide)]
    assert not all(torch.equal(a, b) for a, b in zip(first, others[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, others[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, others[2], strict=True))
    assert session.camera(None, wide) is None
