"""A few seconds of ``scripts/fuzz.py`` with a fixed seed, and what the script says when a case fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lingbot_rt.errors import InvalidInit
from lingbot_rt.server.pictures.kinds import format_of, formats
from scripts import fuzz
from scripts.fuzz_targets.bounds import check_refusal, within
from scripts.fuzz_targets.pictures import corpus

CASES = {"messages": 250, "settings": 250, "session": 20, "connection": 25, "pictures": 120, "worlds": 150}
"""About two seconds of each target."""


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_random_input_breaks_nothing(target):
    """Whatever comes, it is taken or refused in one line, within bounds, and nothing is left behind."""
    tally = fuzz.Tally()
    for case in range(CASES[target]):
        fuzz.try_case(target, 1, case, tally)
    assert tally.cases == CASES[target]
    assert len(tally.ends) >= 2, "too many cases end alike"


def test_a_case_follows_from_its_seed(monkeypatch):
    """The same seed, target and number give the same random numbers; others give others."""
    drawn = []
    monkeypatch.setitem(fuzz.TARGETS, "messages", lambda random: str(drawn.append(random.random())))
    for seed, case in ((1, 0), (1, 0), (1, 1), (2, 0)):
        fuzz.try_case("messages", seed, case, fuzz.Tally())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_a_failure_says_how_to_repeat_it(monkeypatch):
    """The error, the case and one command that tries it again."""

    def broken(random):
        raise ZeroDivisionError("the core is gone")

    monkeypatch.setitem(fuzz.TARGETS, "settings", broken)
    with pytest.raises(fuzz.Failed, match="ZeroDivisionError: the core is gone") as failed:
        fuzz.try_case("settings", 7, 12, fuzz.Tally())
    assert str(failed.value).endswith("python scripts/fuzz.py --target settings --seed 7 --case 12")


def test_the_command_tries_cases(monkeypatch, capsys):
    """One by its number, or as many as there is time for; it says how they ended. A failure is exit code 1."""
    monkeypatch.setitem(fuzz.TARGETS, "settings", lambda random: "fine")
    for words in (["--seed", "1", "--case", "0"], ["--minutes", "0.0001"]):
        monkeypatch.setattr(sys, "argv", ["fuzz.py", "--target", "settings", *words])
        assert fuzz.main() == 0
        assert "fine" in capsys.readouterr().out
    monkeypatch.setitem(fuzz.TARGETS, "settings", lambda random: 1 / 0)
    assert fuzz.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_every_format_is_mutated():
    """The files that the fuzzing begins with are of every format that this installation reads."""
    assert {format_of(data) for _, data in corpus()} == set(formats())


def test_the_checks_can_fail():
    """Memory, time and the text of a refusal are really looked at."""
    with pytest.raises(AssertionError, match="CPU time"), within(2**30, cpu_s=0.0):
        sum(range(10_000))
    if Path("/proc/self/clear_refs").exists():
        with pytest.raises(AssertionError, match="MiB"), within(2**20):
            bytearray(b"x") * 2**28  # far more than other threads may give back meanwhile
    for text in ("<object at 0x7f3a1c>", "a\x1bb", "Traceback (most recent call last)", "x" * 700):
        with pytest.raises(AssertionError):
            check_refusal(InvalidInit(text))
