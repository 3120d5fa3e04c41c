"""Where GPUs may write into each other's memory, and what is said where they may not."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric

from lingbot_rt.parallel import peer_memory
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.peer_memory import PeerMemory, open_peer_memory

CUDA = torch.device("cuda", 1)


class Asked(RankGroup):
    """Rank 1 of three, which hears what the others answer."""

    def __init__(self, *others: bool) -> None:
        super().__init__(1, 3)
        self._others = others

    @property
    def is_first(self) -> bool:
        return True  # rank 0 writes the log

    def share(self, numbers):
        return [list(numbers), *([int(other)] for other in self._others)]


def refused(*args) -> None:
    raise RuntimeError("the driver said no\nsecond line")


@pytest.fixture
def gpus(monkeypatch) -> None:
    """Three GPUs that reach each other, and Triton."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setattr(PeerMemory, "try_out", lambda peers: None)
    monkeypatch.setattr(peer_memory, "_connected", False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("gpus")
def test_all_ranks_must_reach_each_other():
    """One rank that does not is enough for all of them to use NCCL."""
    assert isinstance(open_peer_memory(Asked(True, True), CUDA), PeerMemory)
    assert open_peer_memory(Asked(True, False), CUDA) is None


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda patch: patch.setenv("LOCAL_WORLD_SIZE", "2"), "they are on several hosts"),
        (lambda patch: patch.setitem(sys.modules, "triton", None), "triton is not installed"),
        (lambda patch: patch.setattr(torch.cuda, "device_count", lambda: 1), "does not see the other GPUs"),
        (
            lambda patch: patch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other == 0),
            "GPU 1 has no access to the memory of 2",
        ),
        (lambda patch: patch.setattr(peer_memory, "_connected", True), "with one group of ranks only"),
        (lambda patch: None, "another rank has no access"),
        (lambda patch: patch.setattr(PeerMemory, "try_out", refused), "the driver said no"),
    ],
    ids=["hosts", "triton", "hidden", "access", "connected", "another rank", "driver"],
)
def test_the_log_says_why_not(change, expected, monkeypatch, caplog):
    """One line, with the reason of rank 0 if it has one."""
    change(monkeypatch)
    others = (True, "driver" in expected)
    with caplog.at_level(logging.INFO):
        assert open_peer_memory(Asked(*others), CUDA) is None
        assert open_peer_memory(Asked(True, True), torch.device("cpu")) is None
    assert [expected in message for message in caplog.messages] == [True]


def test_what_is_missing_counts_two_places():
    """In whole pieces of 2 MiB, and nothing where the places are large enough."""
    peers = PeerMemory(Asked(True, True), CUDA)
    assert peers.missing_bytes(1) == 2 * 2**21
    peers._place_bytes = 2**22
    assert [peers.missing_bytes(count) for count in (2**22, 2**22 + 1)] == [0, 2 * 2**21]


def test_a_process_connects_once(monkeypatch):
    """Whatever comes of it: what counts is that torch has counted."""
    monkeypatch.setattr(peer_memory, "_connected", False)
    monkeypatch.setattr(symmetric, "empty", lambda *args, **options: torch.empty(0))
    monkeypatch.setattr(symmetric, "rendezvous", refused)
    monkeypatch.setattr(peer_memory, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=object())))
    with pytest.raises(RuntimeError, match="the driver said no"):
        PeerMemory(Asked(True, True), CUDA)._take(2**21)
    assert peer_memory._connected


def test_a_captured_exchange_counts_when_it_is_replayed(monkeypatch):
    """Not while it is captured. Its waits are those of the newest replay, once for each."""
    ranks, options = Asked(True, True), []

    class Mark:
        def elapsed_time(self, end: Mark) -> float:
            return 2.0

    monkeypatch.setattr(RankGroup, "_mark", staticmethod(lambda **given: (options.append(given), Mark())[1]))
    ranks.begin_chunk()
    with ranks.recording() as replayed:
        for _ in range(3):
            with ranks.exchanging(on_gpu=True):
                pass
    assert ranks.heartbeat.exchanges == 0
    assert options == [{"external": True}] * 6
    replayed()
    replayed()
    with ranks.exchanging(on_gpu=True):
        pass
    assert ranks.heartbeat.exchanges == 7
    ranks.end_chunk(100.0)
    assert ranks.heartbeat.compute_ms == 100 - 7 * 2
    ranks.begin_chunk()
    ranks.end_chunk(100.0)
    assert ranks.heartbeat.compute_ms == 100


def test_places_are_as_before_a_capture(monkeypatch):
    """However it ends: the exchanges inside were not made."""
    peers = PeerMemory(Asked(True, True), torch.device("cpu"))
    peers._buffer, peers._place_bytes = torch.zeros(64, dtype=torch.uint8), 32
    first = peers.place(8, 8).data_ptr()
    with pytest.raises(RuntimeError, match="refused"), peers.recording():
        peers.place(8, 8)
        peers.place(8, 8)
        peers.place(8, 8)
        raise RuntimeError("refused")
    assert peers.place(8, 8).data_ptr() != first
    assert peers.place(8, 8).data_ptr() == first
    waits: list[PeerMemory] = []
    monkeypatch.setattr(peers, "wait", lambda: waits.append(peers))
    peers.even_out()
    assert (peers.place(8, 8).data_ptr(), len(waits)) == (first, 1)
    peers.place(8, 8)
    peers.even_out()
    assert (peers.place(8, 8).data_ptr(), len(waits)) == (first, 1)
