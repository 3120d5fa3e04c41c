"""Frames on their way out of an accelerator: in order, while the engine thread is busy with something else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lingbot_rt.engine import frame_readback
from lingbot_rt.engine.frame_readback import FrameReadback
from lingbot_rt.errors import UnsoundFrames
from lingbot_rt.postprocess.stage import PostProcessor
from lingbot_rt.session.plan import PostprocessPlan
from lingbot_rt.shapes import FrameSize

LIMIT_S = 60


class Arrival:
    """In an event's place: the copy has arrived when the test says so."""

    def __init__(self):
        self.waited_for, self.arrived = threading.Event(), threading.Event()

    def synchronize(self):
        self.waited_for.set()
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


GPU = torch.device("cuda", 0)


def readback(emit, device: torch.device = GPU) -> FrameReadback:
    return FrameReadback(device, PostProcessor(PostprocessPlan(), FrameSize(16, 16), None, None), emit)


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
        assert arrivals[0].waited_for.wait(LIMIT_S)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_frames_of_unsound_latents_stay(arrivals, value):
    """Nobody waits for the device to check them: it is seen when the frames arrive, and raised at the end."""
    out = []
    with pytest.raises(UnsoundFrames, match="chunk 7"), readback(out.append) as leaving:
        leaving.check(torch.full((1, 16, 3, 2, 2), value))
        for index in range(2):
            push(leaving, index)
        assert len(arrivals) == 2
        for arrival in arrivals:
            arrival.arrived.set()
    assert out == []


def test_groups_before_unsound_pixels_leave(arrivals):
    """The first group is out; the second has a pixel that is no number; the third is sound and stays all the same."""
    out, pixels = [], torch.full((1, 3, 4, 16, 16), 0.5)
    broken = pixels.clone()
    broken[0, 1, 2, 3, 4] = torch.nan
    with pytest.raises(UnsoundFrames, match="pixels"), readback(out.append) as leaving:
        for index, each in enumerate((pixels, broken, pixels)):
            leaving.push(each, 7, index, 3)
            arrivals[index].arrived.set()
    assert [group.group_index for group in out] == [0]


@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_a_cancelled_chunk_waits_for_no_more_than_one_group(arrivals, monkeypatch, arrived):
    """When the chunk raises, the group that is being waited for still leaves, those behind it never, and no thread is
    left."""

    class Waiter(ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(**options | {"wait": False})
            arrivals[arrived].arrived.set()
            super().shutdown()

    monkeypatch.setattr(frame_readback, "ThreadPoolExecutor", Waiter)
    out: list[int] = []
    before = threading.active_count()

    def cancelled() -> None:
        with readback(lambda group: out.append(group.group_index)) as leaving:
            for index in range(4):
                push(leaving, index)
            for arrival in arrivals[:arrived]:
                arrival.arrived.set()
            assert arrivals[arrived].waited_for.wait(LIMIT_S)
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        cancelled()
    assert out == list(range(arrived + 1))
    assert threading.active_count() <= before


def test_on_a_cpu_a_group_leaves_inside_push():
    """Without an accelerator there is neither a stream nor a thread."""
    out = []
    with readback(out.append, torch.device("cpu")) as leaving:
        for index in range(2):
            push(leaving, index)
            assert [int(group.pixels.max()) for group in out] == list(range(index + 1))
