"""How long clients wait in line, by the number of replicas: a simulation, without a server.

Clients arrive at random, independent of each other (a Poisson process), and each plays for a random time with a given
mean (exponential). They wait in one line; the first gets the replica that is free first, as in ``deploy/front.py``.
With a limit to the line, a client that finds it full is refused.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CLIENTS = 2_000_000
"""Most clients of one simulation."""


@dataclass(frozen=True, slots=True)
class Traffic:
    per_hour: float  # clients that arrive
    session_s: float  # mean length of a session
    max_waiting: int  # a client that finds so many in line is refused
    hours: float  # simulated
    seed: int = 0

    @property
    def load(self) -> float:
        """Replicas that would be busy on average if nobody had to wait."""
        return self.per_hour / 3600 * self.session_s


@dataclass(frozen=True, slots=True)
class Row:
    """What clients met with ``replicas`` of them. Times in seconds, of the clients that were served."""

    replicas: int
    busy: float  # part of the time that replicas play, 0 to 1
    waited: float  # part of the clients that had to wait
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    refused: float  # part of the clients


@dataclass(frozen=True, slots=True)
class ReplicasReport:
    traffic: Traffic
    clients: int
    load: float
    rows: tuple[Row, ...]


def simulate(traffic: Traffic, replicas: Sequence[int]) -> ReplicasReport:
    """The same clients, by their seed, with each number of ``replicas``."""
    draw = random.Random(traffic.seed)
    clients: list[tuple[float, float]] = []
    now, end = 0.0, 3600 * traffic.hours
    while len(clients) < MAX_CLIENTS:
        now += draw.expovariate(traffic.per_hour / 3600)
        if now >= end:
            break
        clients.append((now, draw.expovariate(1 / traffic.session_s)))
    rows = tuple(_row(clients, count, traffic.max_waiting) for count in replicas)
    return ReplicasReport(traffic, len(clients), traffic.load, rows)


def _row(clients: Sequence[tuple[float, float]], replicas: int, max_waiting: int) -> Row:
    """``clients``: arrival and length of each, in the order of arrival."""
    free_at = [0.0] * replicas  # a heap
    starts: list[float] = []  # of the served clients: never falls, as one line is served in order
    waits: list[float] = []
    played = refused = 0.0
    for arrival, length in clients:
        in_line = len(starts) - bisect_right(starts, arrival)
        if free_at[0] > arrival and in_line >= max_waiting:
            refused += 1
            continue
        start = max(arrival, free_at[0])
        heapq.heapreplace(free_at, start + length)
        starts.append(start)
        waits.append(start - arrival)
        played += length
    span = max([*free_at, 1e-9])
    waits.sort()
    return Row(
        replicas=replicas,
        busy=played / (replicas * span),
        waited=sum(wait > 0 for wait in waits) / max(len(waits), 1),
        mean_s=sum(waits) / max(len(waits), 1),
        p50_s=_quantile(waits, 0.5),
        p95_s=_quantile(waits, 0.95),
        p99_s=_quantile(waits, 0.99),
        refused=refused / max(len(clients), 1),
    )


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def as_text(report: ReplicasReport) -> str:
    traffic = report.traffic
    lines = [
        f"{report.clients} clients in {traffic.hours:g} h: {traffic.per_hour:g} per hour, sessions of "
        f"{traffic.session_s:g} s on average, {report.load:.2f} replicas busy if nobody waits; simulated",
        f"{'replicas':>8} {'busy':>6} {'have to wait':>13} {'mean':>9} {'p50':>9} {'p95':>9} {'p99':>9} {'refused':>8}",
    ]
    for row in report.rows:
        times = " ".join(f"{value:7.0f} s" for value in (row.mean_s, row.p50_s, row.p95_s, row.p99_s))
        lines.append(f"{row.replicas:>8} {row.busy:>6.0%} {row.waited:>13.0%} {times} {row.refused:>8.1%}")
    return "\n".join(lines)
