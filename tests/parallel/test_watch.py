"""Which rank is blamed for what, over pulses alone: no other processes, and a clock that the test moves."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from lingbot_rt.parallel import watch as watch_module
from lingbot_rt.parallel.watch import CAUSE_GRACE_S, Pulse, PulseSender, Watch, ending_s

WORLD = 3
TIMEOUT_S = 16
LIMIT_S = TIMEOUT_S - ending_s(TIMEOUT_S)
STEP_S = 1


class Followers:
    """A watch over ranks 1 and 2, whose pulses the test tells."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.own = Pulse()
        self.said: list[str] = []
        store = dist.HashStore()
        self.watch = Watch(store, WORLD, self.own, TIMEOUT_S, self.said.append, lambda: self.now)
        self.pulses = {rank: Pulse() for rank in range(1, WORLD)}
        self._senders = {
            rank: PulseSender(store, rank, pulse, LIMIT_S, lambda: None) for rank, pulse in self.pulses.items()
        }
        self.look()

    def look(self, *, alive: tuple[int, ...] = (1, 2)) -> str:
        """What the watch says after those ``alive`` have told their pulses."""
        for rank in alive:
            self._senders[rank].tell()
        return self.watch.look()

    def look_for(self, seconds: float, *, alive: tuple[int, ...] = (1, 2)) -> str:
        """The same, a look a second, until it says something or the time is over."""
        verdict = ""
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            verdict = verdict or self.look(alive=alive)
        return verdict


@pytest.fixture
def followers():
    return Followers()


def test_the_rank_that_others_wait_for_is_blamed(followers):
    """Among ranks that stand still while there is work, the one with the fewest exchanges stalled; it is told once."""
    followers.own.exchanges, followers.pulses[1].exchanges, followers.pulses[2].exchanges = 8, 8, 7
    with followers.watch.at_work():
        assert followers.look_for(LIMIT_S) == ""
        verdict = followers.look_for(LIMIT_S)
    assert verdict == "rank 2 stalled: for 11 s it has not come to exchange 8, where the others wait"
    assert followers.said == [verdict]


def test_rank_0_can_be_the_one_that_stalls(followers):
    """The watch looks at its own process as at the others."""
    followers.own.exchanges, followers.pulses[1].exchanges, followers.pulses[2].exchanges = 3, 4, 4
    with followers.watch.at_work():
        assert followers.look_for(3 * LIMIT_S).startswith("rank 0 stalled")


def test_any_progress_is_no_stall(followers):
    """A rank that loads or decodes without an exchange moves all the same."""
    with followers.watch.at_work():
        for _ in range(5):
            followers.pulses[1].ticks += 1
            assert followers.look_for(LIMIT_S) == ""


def test_ranks_that_all_wait_in_one_exchange_blame_the_link(followers):
    """Nobody is behind: no rank is blamed."""
    with followers.watch.at_work():
        assert "the link between them is broken" in followers.look_for(3 * LIMIT_S)


def test_standing_still_between_commands_is_no_stall(followers):
    """An idle service is left alone."""
    followers.own.exchanges, followers.pulses[1].exchanges = 3, 4
    assert followers.look_for(5 * LIMIT_S) == ""
    assert followers.said == []


def test_a_rank_that_falls_silent(followers):
    """A frozen process is missed although nobody has asked it for anything; a start is waited for longer."""
    with followers.watch.at_work(patience=1000):
        assert followers.look_for(LIMIT_S, alive=(1,)) == ""
        assert followers.look_for(LIMIT_S, alive=(1,)) == "rank 2 gave no sign of life for 11 s"


def test_a_rank_that_never_comes_up():
    """Without a pulse and without an end of its process, a follower did not start: said after the start's own limit."""
    store, now, said = dist.HashStore(), [0.0], []
    watch = Watch(store, WORLD, Pulse(), TIMEOUT_S, said.append, lambda: now[0])
    with watch.at_work(patience=10):
        now[0] = 10 * LIMIT_S
        assert watch.look() == ""
        now[0] += 1
        assert watch.look() == "rank 1 did not start within 101 s"
    assert not watch.await_all()


def test_a_consequence_waits_for_its_cause(followers):
    """A rank that lost its connection is not blamed when another says what broke it."""
    followers.pulses[1].is_consequence, followers.pulses[1].failure = True, "connection closed"
    assert followers.look_for(CAUSE_GRACE_S - STEP_S) == ""
    followers.pulses[2].failure = "ValueError: the cause"
    assert followers.look() == "rank 2 failed: ValueError: the cause"


def test_a_consequence_without_a_cause_is_told_as_it_is(followers):
    """When nobody else has failed, the broken connection is the news."""
    followers.pulses[1].is_consequence, followers.pulses[1].failure = True, "connection closed"
    assert followers.look_for(2 * CAUSE_GRACE_S) == "rank 1 lost its connection to the others: connection closed"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "rank 2 ended by itself with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "rank 2 was killed by SIGKILL"),
    ],
)
def test_an_ended_process_is_named_with_its_end(followers, code, said):
    """Exit code and signal are told apart."""
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:
        process.wait()
        followers.watch.start({2: process})
        try:
            assert followers.watch.explain(RuntimeError("closed"), is_consequence=True) == said
        finally:
            followers.watch.stop()


def test_rank_0s_own_failure_is_the_verdict(followers):
    """It is blamed at once for its own error."""
    assert followers.watch.explain(ValueError("mine"), is_consequence=False) == "rank 0 failed: ValueError: mine"


def test_rank_0s_error_may_follow_from_another_ranks(followers):
    """Then that one is the verdict."""
    followers.pulses[1].failure = "ValueError: theirs"
    followers.look()
    verdict = followers.watch.explain(RuntimeError("closed"), is_consequence=True)
    assert verdict == "rank 1 failed: ValueError: theirs"


def test_a_rank_that_went_away_unseen(followers, monkeypatch):
    """A process of another host ends without a word: its neighbours lose it, and its pulse has stopped."""
    monkeypatch.setattr(watch_module, "PERIOD_S", 0)
    monkeypatch.setattr(watch_module, "CAUSE_GRACE_S", 0)
    followers.look_for(2, alive=(1,))
    assert followers.watch.explain(RuntimeError("closed"), is_consequence=True) == "rank 2 is gone"


class SilentStore:
    """The other end of a link that was cut: nothing is refused and nothing answers."""

    def __init__(self) -> None:
        self.never = threading.Event()

    def set(self, key: str, value: str) -> None:
        self.never.wait()
        raise RuntimeError("closed at last")


def test_a_follower_ends_when_rank_0_does_not_answer():
    """It would wait for ever in a collective, on a host that nobody else can reach."""
    store, ended = SilentStore(), threading.Event()
    sender = PulseSender(store, 1, Pulse(), 0.1, ended.set)
    sender.start()
    assert ended.wait(60)
    store.never.set()
    sender.stop()
