"""Which forwards are captured and replayed: on a CPU, with graphs that only remember what ran in them."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from lingbot_rt.models import captured_forward
from lingbot_rt.models.captured_forward import MOST_FAILURES, MOST_GRAPHS, SPARE_BYTES, CapturedForwards
from lingbot_rt.models.fused_blocks import PlainOps
from lingbot_rt.models.kv_cache import KVCache

from .test_fused import random_dit, relative_rms, window

CPU = torch.device("cpu")


class FakeGraph:
    """Runs again what was told to ``captured`` between its begin and its end."""

    underway: FakeGraph | None = None

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self._again, FakeGraph.underway = [], self

    def capture_end(self) -> None:
        FakeGraph.underway = None

    def replay(self) -> None:
        for again in self._again:
            again()

    @classmethod
    def captured(cls, again) -> None:
        if cls.underway is not None:
            cls.underway._again.append(again)


@pytest.fixture
def device(monkeypatch) -> SimpleNamespace:
    """What the graphs ask of torch.cuda, and ``free`` bytes; ``ended``: pools that a failed capture left open."""
    reserved, stream = count(step=1000), SimpleNamespace(wait_stream=lambda other: None)
    device = SimpleNamespace(free=SPARE_BYTES, ended=[])
    cuda = SimpleNamespace(
        Stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
        current_stream=lambda device: stream,
        current_device=lambda: 0,
        graph_pool_handle=object,
        memory_reserved=lambda device: next(reserved),
        mem_get_info=lambda _: (device.free, 0),
        synchronize=lambda device: None,
        empty_cache=lambda: None,
        CUDAGraph=FakeGraph,
    )
    private = SimpleNamespace(_cuda_endAllocateToPool=lambda index, pool: device.ended.append(pool))
    monkeypatch.setattr(captured_forward, "torch", SimpleNamespace(cuda=cuda, clone=torch.clone, _C=private))
    return device


@pytest.fixture
def graphs(device) -> CapturedForwards:
    return CapturedForwards(CPU)


class Doubling:
    """A computation that notes its inputs' addresses."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.replays = 0

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.seen.append(inputs[0].data_ptr())
        result = 2 * inputs[0]
        FakeGraph.captured(lambda: torch.mul(inputs[0], 2, out=result))
        return result

    @contextmanager
    def recording(self):
        def replayed() -> None:
            self.replays += 1

        yield replayed


def test_a_forward_runs_is_captured_and_is_replayed(graphs):
    """Once as it is, then captured and replayed; after that it is replayed only, always on the same inputs. Each result
    is the caller's own."""
    compute, given, results = Doubling(), [torch.full((3,), float(i)) for i in range(5)], []
    for x in given:
        results.append(graphs.run("layout", (x,), compute, compute.recording))
    assert [result.tolist() for result in results] == [[2.0 * i] * 3 for i in range(5)]
    assert compute.seen[0] == given[0].data_ptr()
    assert len(compute.seen) == 2
    assert compute.replays == 4
    assert graphs.nbytes == 1000


def test_another_layout_or_shape_is_another_forward(graphs):
    """Forwards of one shape share their inputs' memory."""
    compute = Doubling()
    for layout, size in ((1, 3), (2, 3), (1, 4), (1, 3), (2, 3), (1, 4)):
        assert graphs.run(layout, (torch.ones(size),), compute, compute.recording).tolist() == [2.0] * size
    assert len(compute.seen) == 6
    assert compute.seen[3] == compute.seen[4] != compute.seen[5]
    assert compute.replays == 3


def test_the_oldest_graphs_are_dropped(graphs):
    """Those in use stay."""
    compute = Doubling()
    for layout in range(MOST_GRAPHS + 1):
        for _ in range(2):
            graphs.run(layout, (torch.ones(1),), compute, compute.recording)
        graphs.run(0, (torch.ones(1),), compute, compute.recording)
    ran = len(compute.seen)
    graphs.run(0, (torch.ones(1),), compute, compute.recording)
    assert len(compute.seen) == ran
    graphs.run(1, (torch.ones(1),), compute, compute.recording)
    assert len(compute.seen) == ran + 1


def test_nothing_is_captured_in_memory_that_others_may_need(graphs, device):
    """With too little of it free, forwards run as they are until there is more. Dropped graphs are captured again."""
    device.free -= 1
    compute = Doubling()

    def run(times: int) -> int:
        for _ in range(times):
            assert graphs.run("layout", (torch.ones(2),), compute, compute.recording).tolist() == [2.0, 2.0]
        return compute.replays

    assert run(4) == 0
    device.free += 1
    assert run(2) == 2
    graphs.clear()
    assert graphs.nbytes == 0
    assert run(3) == 2 + 2


def test_forwards_go_on_without_graphs(graphs, device, monkeypatch, caplog):
    """A driver that refuses is asked three times, each with one line in the log, and every forward gives its result."""

    def refuse(graph: FakeGraph) -> None:
        FakeGraph.underway = None
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr(FakeGraph, "capture_end", refuse)
    compute = Doubling()
    with caplog.at_level(logging.WARNING):
        results = [graphs.run("layout", (torch.ones(2),), compute, compute.recording) for _ in range(12)]
    assert [result.tolist() for result in results] == [[2.0, 2.0]] * 12
    assert len(caplog.messages) == len(device.ended) == MOST_FAILURES
    assert "operation not permitted" in caplog.text
    assert (compute.replays, graphs.nbytes) == (0, 0)


class Layouts:
    """CapturedForwards that only says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def run(self, layout, inputs, compute, recording):
        self.asked.append(layout)
        return compute(inputs)


@torch.inference_mode()
def test_only_forwards_of_a_full_window_repeat():
    """From the chunk on that fills the window, its forwards and its context pass come again with the same layout. Not
    those of a chunk that is computed again, which sees a copy; and another camera or text elsewhere is another
    layout."""
    dit = random_dit()
    dit.fuse_blocks(PlainOps())
    dit.captured = graphs = Layouts()
    cache = window(dit, torch.float32)
    x, text_kv = torch.randn(1, 8, 1, 4, 4), dit.text_kv(torch.randn(1, 8, 16))
    camera = dit.camera_modulation(torch.randn(1, 384, 1, 4, 4))

    def play(frame: int, text_kv=text_kv, camera=camera) -> list[object]:
        graphs.asked = []
        dit(x, 700.0, text_kv, camera, cache, frame)
        dit(x, 0.0, text_kv, camera, cache, frame, commit=True)
        return graphs.asked

    assert [len(play(frame)) for frame in range(3)] == [0, 0, 0]
    first = play(3)
    assert len(set(first)) == 2
    assert play(4) == first
    assert play(3) == []
    assert play(5) == first
    for others in ({"camera": None}, {"text_kv": dit.text_kv(torch.randn(1, 8, 16))}):
        assert set(first).isdisjoint(play(6, **others))


@torch.inference_mode()
def test_windows_of_other_frames_are_other_layouts():
    """As many tokens in as much memory, but twice as many of them visible."""
    values = {"num_layers": 1, "num_heads": 1, "head_dim": 8, "sink_frames": 0, "dtype": torch.float32, "device": CPU}
    small = KVCache(tokens_per_frame=4, window_frames=12, recent_frames=(6,), **values)
    large = KVCache(tokens_per_frame=8, window_frames=6, **values)
    small.limit(6)
    for start in range(0, 12, 2):
        small.begin(start, 2)
    for start in range(6):
        large.begin(start, 1)
    assert small.repeats
    assert large.repeats
    pointers = (0, 8)  # in these positions of the layout
    mine, theirs = ([value for i, value in enumerate(cache.layout) if i not in pointers] for cache in (small, large))
    assert len(mine) == 9
    assert mine[:-1] == theirs[:-1]
    assert (mine[-1], theirs[-1]) == (24, 48)


@torch.inference_mode()
def test_rows_follow_the_window():
    """The same tensor says where each chunk's tokens are kept, and -1 for a frame that has left."""
    cache = window(random_dit(), torch.float32)
    cache.begin(0, 2)
    rows = cache.rows
    assert rows.tolist() == [*range(8)]
    for frame, expected in ((2, [*range(8, 16)]), (4, [*range(4, 12)])):
        cache.begin(frame, 2)
        assert cache.rows is rows
        assert rows.tolist() == expected
    cache.begin(2, 2)
    assert cache.rows.tolist() == [-1] * 4 + [*range(12, 16)]


@torch.inference_mode()
def test_a_camera_is_written_over():
    """``into`` takes the values and keeps its place."""
    dit = random_dit()
    rays = torch.randn(2, 1, 384, 2, 4, 4)
    kept = dit.camera_modulation(rays[0])
    places = [tensor.data_ptr() for pair in kept for tensor in pair]
    again = dit.camera_modulation(rays[1], kept)
    assert [tensor.data_ptr() for pair in again for tensor in pair] == places
    for pair, expected in zip(again, dit.camera_modulation(rays[1]), strict=True):
        for got, right in zip(pair, expected, strict=True):
            assert relative_rms(got, right) == 0
