"""Which rank is blamed for what, over pulses alone: no processes."""

from __future__ import annotations

import queue
import subprocess
import sys

import pytest
import torch.distributed as dist

from lingbot_rt.parallel import watch as watch_module
from lingbot_rt.parallel.watch import Pulse, PulseSender, Watch

WORLD = 3


class Followers:
    """A watch over ranks whose pulses the test tells; ``verdict`` waits for what it says."""

    def __init__(self, limit_s: float) -> None:
        self.store = dist.HashStore()
        self.own = Pulse()
        self._said: queue.Queue[str] = queue.Queue()
        self.watch = Watch(self.store, WORLD, self.own, limit_s / watch_module.JUDGED_AT, self._said.put)
        self.pulses = {rank: Pulse() for rank in range(1, WORLD)}
        self._senders = {
            rank: PulseSender(self.store, rank, pulse, lambda: None) for rank, pulse in self.pulses.items()
        }

    def come_up(self, *ranks: int) -> None:
        for rank in ranks or self._senders:
            self._senders[rank].tell()

    def beat(self) -> None:
        """From now on every follower is alive, whatever it does."""
        for sender in self._senders.values():
            sender.start()

    def verdict(self) -> str:
        said = self._said.get(timeout=20)
        assert self._said.empty()
        return said

    def is_quiet_for(self, seconds: float) -> bool:
        with pytest.raises(queue.Empty):
            self._said.get(timeout=seconds)
        return True

    def end(self) -> None:
        self.watch.stop()
        for sender in self._senders.values():
            if sender._thread.is_alive():
                sender.stop()


@pytest.fixture
def followers():
    made = Followers(limit_s=0.6)
    yield made
    made.end()


def test_the_rank_that_others_wait_for_is_blamed(followers):
    """Among ranks that stand still while there is work, the one with the fewest exchanges stalled."""
    followers.beat()
    followers.own.exchanges, followers.pulses[1].exchanges, followers.pulses[2].exchanges = 8, 8, 7
    followers.watch.start({})
    with followers.watch.at_work():
        assert followers.verdict().startswith("rank 2 stalled: for 1 s it has not come to exchange 8")


def test_rank_0_can_be_the_one_that_stalls(followers):
    """The watch looks at its own process as at the others."""
    followers.beat()
    followers.own.exchanges, followers.pulses[1].exchanges, followers.pulses[2].exchanges = 3, 4, 4
    followers.watch.start({})
    with followers.watch.at_work():
        assert followers.verdict().startswith("rank 0 stalled")


def test_ranks_that_all_wait_in_one_exchange_blame_the_link(followers):
    """Nobody is behind: no rank is blamed."""
    followers.beat()
    followers.watch.start({})
    with followers.watch.at_work():
        assert "the link between them is broken" in followers.verdict()


def test_standing_still_between_commands_is_no_stall(followers):
    """An idle service is left alone."""
    followers.beat()
    followers.own.exchanges, followers.pulses[1].exchanges = 3, 4
    followers.watch.start({})
    assert followers.is_quiet_for(1.5)
    assert followers.watch.verdict == ""


def test_a_rank_that_falls_silent(followers):
    """A frozen process is missed although nobody has asked it for anything; a start is waited for longer."""
    followers.come_up(1)
    with followers.watch.at_work(patience=1000):
        followers.watch.start({})
        assert followers.verdict() == "rank 1 gave no sign of life for 1 s"


def test_a_rank_that_never_comes_up(followers):
    """Without a pulse and without an end of its process, a follower did not start."""
    followers.watch.start({})
    assert followers.verdict() == "rank 1 did not start within 1 s"
    assert not followers.watch.await_all()


def test_a_consequence_waits_for_its_cause(followers):
    """A rank that lost its connection is not blamed when another says what broke it."""
    followers.beat()
    followers.watch.start({})
    followers.pulses[1].is_consequence, followers.pulses[1].failure = True, "connection closed"
    assert followers.is_quiet_for(0.5)
    followers.pulses[2].failure = "ValueError: the cause"
    assert followers.verdict() == "rank 2 failed: ValueError: the cause"


def test_a_consequence_without_a_cause_is_told_as_it_is(followers):
    """When nobody else has failed, the broken connection is the news."""
    followers.watch.limit_s = 60
    followers.beat()
    followers.watch.start({})
    followers.pulses[1].is_consequence, followers.pulses[1].failure = True, "connection closed"
    assert followers.verdict() == "rank 1 lost its connection to the others: connection closed"


def test_a_rank_that_went_away_unseen(followers):
    """A process of another host ends without a word: its neighbours lose it, and its pulse has stopped."""
    followers.watch.limit_s = 60
    followers.come_up(1)
    followers.watch.start({})
    assert followers.watch.explain(RuntimeError("closed"), is_consequence=True) == "rank 1 is gone"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "rank 2 ended by itself with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "rank 2 was killed by SIGKILL"),
    ],
)
def test_an_ended_process_is_named_with_its_end(followers, code, said):
    """Exit code and signal are told apart."""
    followers.beat()
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:
        followers.watch.start({2: process})
        assert followers.verdict() == said


def test_rank_0s_own_failure_is_the_verdict_unless_it_is_a_consequence(followers, monkeypatch):
    """explain blames rank 0 at once for its own error, and another rank for an error that followed from it."""
    followers.beat()
    followers.watch.start({})
    assert followers.watch.explain(ValueError("mine"), is_consequence=False) == "rank 0 failed: ValueError: mine"
    followers.end()
    other = Followers(limit_s=60)
    other.beat()
    other.watch.start({})
    other.pulses[1].failure = "ValueError: theirs"
    assert other.watch.explain(RuntimeError("closed"), is_consequence=True) == "rank 1 failed: ValueError: theirs"
    other.end()
