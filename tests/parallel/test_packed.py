"""Commands that cross ranks arrive as they were sent, and nothing else does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lingbot_rt.parallel.coordinator import AskRoom, Close, Move, OpenFrom, Rewind, Stop, WarmUpShape
from lingbot_rt.parallel.packed import pack, unpack
from lingbot_rt.session.plan import ChunkPlan, PostprocessPlan, SessionPlan
from lingbot_rt.shapes import FrameSize

KINDS = (AskRoom, WarmUpShape, SessionPlan, OpenFrom, ChunkPlan, Rewind, Move, Close, Stop)
SESSION = SessionPlan(
    session_id="s",
    prompt="A quiet street. \N{SNOWMAN}",
    first_frame=np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3),
    size=FrameSize(3, 2),
    latent_frames=3,
    seed=2**63 - 1,
    num_steps=4,
    guidance_scale=1.5,
    negative_prompt="",
    sink_frames=3,
    window_frames=12,
    postprocess=PostprocessPlan(upscaling_scale=2, upscaling_model=Path("/models/up.pth")),
    recent_frames=(3, 12),
)
POSES = np.random.default_rng(0).normal(size=(3, 4, 4))


@pytest.mark.parametrize(
    "command",
    [
        SESSION,
        WarmUpShape(SESSION),
        AskRoom(dataclasses.replace(SESSION, first_frame=SESSION.first_frame[:0])),
        ChunkPlan("s", 7, "A storm.", POSES, None, intrinsics=POSES[:, 0]),
        ChunkPlan("s", 0, "A storm.", None, 5, recent_frames=3, recache=True),
        ChunkPlan("s", 0, "A storm.", POSES[::-1, :, ::-1], 5),
        OpenFrom(SESSION, bytes(range(256))),
        Rewind("s", 2**31, 3, True),
        Move("s", to_host=True),
        Close("s"),
        Stop(),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_command_arrives_as_it_was_sent(command):
    got = unpack(pack(command), KINDS)
    assert type(got) is type(command)
    assert _comparable(got) == _comparable(command)


def _comparable(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if dataclasses.is_dataclass(value):
        return {field.name: _comparable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def test_what_is_no_command_is_refused():
    """Another class, other fields, or what has no form on the wire: never an object that was not asked for."""
    with pytest.raises(ValueError, match="a command Close, expected one of Stop"):
        unpack(pack(Close("s")), (Stop,))
    with pytest.raises(msgspec.ValidationError, match="session_id"):
        unpack(msgspec.msgpack.encode(["Close", {}]), KINDS)
    with pytest.raises(TypeError, match="function does not cross ranks"):
        pack(Close(_comparable))  # type: ignore[arg-type]
