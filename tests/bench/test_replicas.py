"""The simulation of replicas: against the formulas of queues, and its command."""

from __future__ import annotations

import json
from math import factorial

import pytest

from lingbot_rt.bench.replicas import Traffic, simulate
from lingbot_rt.cli import main


def erlang_c(servers: int, load: float) -> float:
    """The part of the clients that wait in an M/M/c queue."""
    busy = load**servers / factorial(servers) * servers / (servers - load)
    return busy / (sum(load**k / factorial(k) for k in range(servers)) + busy)


@pytest.mark.parametrize("replicas", [3, 4, 6])
def test_waits_are_those_of_the_formula(replicas):
    """Without a limit to the line: who waits and for how long, as Erlang's formula has it."""
    traffic = Traffic(per_hour=30, session_s=240, max_waiting=10**6, hours=4000)
    [row] = simulate(traffic, [replicas]).rows
    waits = erlang_c(replicas, traffic.load)
    assert row.waited == pytest.approx(waits, rel=0.1)
    assert row.mean_s == pytest.approx(waits * 240 / (replicas - traffic.load), rel=0.15)
    assert row.busy == pytest.approx(traffic.load / replicas, rel=0.05)
    assert row.refused == 0


def test_a_full_line_refuses():
    """One replica and no line: Erlang's loss formula, load / (1 + load)."""
    traffic = Traffic(per_hour=30, session_s=240, max_waiting=0, hours=4000)
    [row] = simulate(traffic, [1]).rows
    assert row.refused == pytest.approx(2 / 3, rel=0.05)
    assert row.waited == 0


def test_a_line_is_never_longer_than_its_limit():
    """With more clients than one replica can serve, the longest wait is bounded by the line."""
    small, large = (
        simulate(Traffic(per_hour=60, session_s=120, max_waiting=limit, hours=500), [1]).rows[0] for limit in (1, 8)
    )
    assert small.refused > large.refused > 0
    assert small.p99_s < large.p99_s


def test_the_command_prints_a_row_per_number(capsys, tmp_path):
    """More replicas, shorter waits, and the same figures in the file."""
    file = tmp_path / "replicas.json"
    assert (
        main(["bench", "replicas", "--replicas", "2,4", "--per-hour", "30", "--session", "4m", "--json", str(file)])
        == 0
    )
    rows = json.loads(file.read_text())["rows"]
    assert [row["replicas"] for row in rows] == [2, 4]
    assert rows[0]["p95_s"] > rows[1]["p95_s"]
    assert len(capsys.readouterr().out.splitlines()) == 4
