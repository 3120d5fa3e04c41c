"""Which rank is named for which failure, from heartbeats alone: no worker processes, and a clock the test moves."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from lingbot_rt.errors import PeerLost
from lingbot_rt.parallel import watchdog as watchdog_module
from lingbot_rt.parallel.watchdog import CAUSE_GRACE_S, Heartbeat, HeartbeatSender, Watchdog, shutdown_s

WORLD = 3
TIMEOUT_S = 16
LIMIT_S = TIMEOUT_S - shutdown_s(TIMEOUT_S)
STEP_S = 1


class Workers:
    """A watchdog of ranks 1 and 2, whose heartbeats the test sends."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.own = Heartbeat()
        self.reported: list[str] = []
        store = dist.HashStore()
        self.watchdog = Watchdog(store, WORLD, self.own, TIMEOUT_S, self.reported.append, lambda: self.now)
        self.heartbeats = {rank: Heartbeat() for rank in range(1, WORLD)}
        self._senders = {
            rank: HeartbeatSender(store, rank, heartbeat, LIMIT_S, lambda: None)
            for rank, heartbeat in self.heartbeats.items()
        }
        self.check()

    def check(self, *, alive: tuple[int, ...] = (1, 2)) -> str:
        """The watchdog's failure after the ranks ``alive`` have sent their heartbeats."""
        for rank in alive:
            self._senders[rank].send()
        return self.watchdog.check()

    def check_for(self, seconds: float, *, alive: tuple[int, ...] = (1, 2)) -> str:
        """The first failure of one check per second over ``seconds``."""
        failure = ""
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            failure = failure or self.check(alive=alive)
        return failure


@pytest.fixture
def workers():
    return Workers()


def test_the_rank_that_others_wait_for_is_named(workers):
    """When no rank makes progress during work, the one with the fewest exchanges is named, once."""
    workers.own.exchanges, workers.heartbeats[1].exchanges, workers.heartbeats[2].exchanges = 8, 8, 7
    with workers.watchdog.expect_progress():
        assert workers.check_for(LIMIT_S) == ""
        failure = workers.check_for(LIMIT_S)
    assert failure == "rank 2 stalled: for 11 s it has not come to exchange 8, where the others wait"
    assert workers.reported == [failure]


def test_rank_0_can_be_the_one_that_stalls(workers):
    """The watchdog checks its own process too."""
    workers.own.exchanges, workers.heartbeats[1].exchanges, workers.heartbeats[2].exchanges = 3, 4, 4
    with workers.watchdog.expect_progress():
        assert workers.check_for(3 * LIMIT_S).startswith("rank 0 stalled")


def test_what_takes_long_is_no_stall_until_its_own_limit(workers):
    """Compiling for a new size shows no progress: the ranks have that long, and afterwards the usual time again. A rank
    that falls silent meanwhile is lost as soon as ever."""
    workers.own.exchanges, workers.heartbeats[1].exchanges, workers.heartbeats[2].exchanges = 8, 8, 7
    with workers.watchdog.expect_progress(patience=2.5):
        assert workers.check_for(2.5 * LIMIT_S) == ""
    with workers.watchdog.expect_progress():
        assert workers.check_for(LIMIT_S) == ""
    with workers.watchdog.expect_progress(patience=2.5):
        assert workers.check_for(LIMIT_S + 2, alive=(1,)).startswith("rank 2 gave no sign of life")


def test_any_progress_is_no_stall(workers):
    """Loading or decoding without an exchange counts as progress."""
    with workers.watchdog.expect_progress():
        for _ in range(5):
            workers.heartbeats[1].ticks += 1
            assert workers.check_for(LIMIT_S) == ""


def test_when_all_ranks_wait_in_one_exchange_the_link_is_named(workers):
    """No rank is behind, so no rank is named."""
    with workers.watchdog.expect_progress():
        assert "the link between them is broken" in workers.check_for(3 * LIMIT_S)


def test_no_progress_between_commands_is_no_stall(workers):
    """An idle service is no failure."""
    workers.own.exchanges, workers.heartbeats[1].exchanges = 3, 4
    assert workers.check_for(5 * LIMIT_S) == ""
    assert workers.reported == []


def test_a_rank_that_falls_silent(workers):
    """A frozen process is noticed after the limit, without a command and whatever the patience of a start."""
    with workers.watchdog.expect_progress(patience=1000):
        assert workers.check_for(LIMIT_S, alive=(1,)) == ""
        assert workers.check_for(LIMIT_S, alive=(1,)) == "rank 2 gave no sign of life for 11 s"


def test_a_rank_that_never_starts():
    """A worker that sends no heartbeat and does not exit is named after the longer limit of a start."""
    store, now, reported = dist.HashStore(), [0.0], []
    watchdog = Watchdog(store, WORLD, Heartbeat(), TIMEOUT_S, reported.append, lambda: now[0])
    with watchdog.expect_progress(patience=10):
        now[0] = 10 * LIMIT_S
        assert watchdog.check() == ""
        now[0] += 1
        assert watchdog.check() == "rank 1 did not start within 101 s"
    assert reported == ["rank 1 did not start within 101 s"]
    assert not watchdog.wait_for_workers()


def test_a_lost_connection_waits_for_its_cause(workers):
    """A rank that lost its connection is not named when another rank reports the cause."""
    workers.heartbeats[1].is_peer_lost, workers.heartbeats[1].error = True, "connection closed"
    assert workers.check_for(CAUSE_GRACE_S - STEP_S) == ""
    workers.heartbeats[2].error = "ValueError: the cause"
    assert workers.check() == "rank 2 failed: ValueError: the cause"


def test_a_lost_connection_without_a_cause(workers):
    """When no rank reports a cause, the failure is the lost connection."""
    workers.heartbeats[1].is_peer_lost, workers.heartbeats[1].error = True, "connection closed"
    assert workers.check_for(2 * CAUSE_GRACE_S) == "rank 1 lost its connection to the others: connection closed"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise SystemExit(3)", "rank 2 ended by itself with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "rank 2 was killed by SIGKILL"),
    ],
)
def test_a_process_that_exits(workers, code, failure):
    """The failure has the exit code or the signal."""
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:
        process.wait()
        workers.watchdog.start({2: process})
        try:
            assert workers.watchdog.explain(PeerLost("closed")) == failure
        finally:
            workers.watchdog.stop()


def test_rank_0s_own_error(workers):
    """Rank 0 is named for its own error at once."""
    assert workers.watchdog.explain(ValueError("mine")) == "rank 0 failed: ValueError: mine"


def test_rank_0_lost_a_peer(workers):
    """When rank 0's error only follows from another rank's, that rank is named."""
    workers.heartbeats[1].error = "ValueError: theirs"
    workers.check()
    assert workers.watchdog.explain(PeerLost("closed")) == "rank 1 failed: ValueError: theirs"


def test_a_remote_process_that_exits(workers, monkeypatch):
    """A process on another host exits without a report: the others lose it, and its heartbeats have stopped."""
    monkeypatch.setattr(watchdog_module, "PERIOD_S", 0)
    monkeypatch.setattr(watchdog_module, "CAUSE_GRACE_S", 0)
    workers.check_for(2, alive=(1,))
    assert workers.watchdog.explain(PeerLost("closed")) == "rank 2 is gone"


class SilentStore:
    """A store behind a cut link: it neither refuses nor answers."""

    def __init__(self) -> None:
        self.never = threading.Event()

    def set(self, key: str, value: str) -> None:
        self.never.wait()
        raise RuntimeError("closed at last")


def test_a_worker_ends_when_rank_0_does_not_answer():
    """Otherwise it would wait in a collective for ever."""
    store, ended = SilentStore(), threading.Event()
    sender = HeartbeatSender(store, 1, Heartbeat(), 0.1, ended.set)
    sender.start()
    assert ended.wait(60)
    store.never.set()
    sender.stop()
