"""Frames on their way out of an accelerator: in order, while the engine thread is busy with something else."""

from __future__ import annotations

import threading

import pytest
import torch

from lingbot_rt.engine import frame_readback
from lingbot_rt.engine.frame_readback import FrameReadback
from lingbot_rt.postprocess.stage import PostProcessor
from lingbot_rt.session.plan import PostprocessPlan
from lingbot_rt.shapes import FrameSize

LIMIT_S = 60


class Arrival:
    """In an event's place: the copy has arrived when the test says so."""

    def __init__(self):
        self.arrived = threading.Event()

    def synchronize(self):
        assert self.arrived.wait(LIMIT_S)


@pytest.fixture
def arrivals(monkeypatch) -> list[Arrival]:
    """Copies that stay on their way until the test lets them arrive, one per push."""
    made: list[Arrival] = []

    def start_copy(frames):
        made.append(Arrival())
        return frames, made[-1]

    monkeypatch.setattr(frame_readback, "start_copy", start_copy)
    return made


def readback(emit) -> FrameReadback:
    size = FrameSize(16, 16)
    return FrameReadback(torch.device("cuda", 0), PostProcessor(PostprocessPlan(), size, None, None), emit)


def push(to: FrameReadback, index: int) -> None:
    to.push(torch.full((1, 3, 4, 16, 16), index / 255 + 1e-3), 7, index, 3)


def test_a_group_leaves_when_it_has_arrived(arrivals):
    """The first group is out while later ones are still on their way and it is still in use; order is kept."""
    out, first_out = [], threading.Event()

    def emit(group):
        out.append(group)
        first_out.set()

    with readback(emit) as leaving:
        for index in range(3):
            push(leaving, index)
        arrivals[2].arrived.set()
        assert out == []
        arrivals[0].arrived.set()
        assert first_out.wait(LIMIT_S)
        assert [group.group_index for group in out] == [0]
        arrivals[1].arrived.set()
    assert [(group.chunk_index, group.group_index, group.num_groups) for group in out] == [(7, i, 3) for i in range(3)]
    assert [int(group.pixels[0, 0, 0, 0]) for group in out] == [0, 1, 2]
    assert leaving.num_frames == 12


def test_an_error_of_emit_is_raised_at_the_end(arrivals):
    """What the callback raised on the readback's thread comes out of the chunk."""

    def emit(group):
        raise ValueError("the client is gone")

    with pytest.raises(ValueError, match="the client is gone"), readback(emit) as leaving:
        push(leaving, 0)
        arrivals[0].arrived.set()


def test_a_cancelled_chunk_waits_for_no_more_than_one_group(arrivals):
    """When the chunk raises, groups that are not being waited for yet never leave, and no thread is left."""
    out: list[int] = []
    before = threading.active_count()

    def cancelled() -> None:
        with readback(lambda group: out.append(group.group_index)) as leaving:
            for index in range(3):
                push(leaving, index)
            threading.Timer(0.05, arrivals[0].arrived.set).start()
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        cancelled()
    assert out in ([], [0])
    assert threading.active_count() <= before + 1  # the timer may be ending
