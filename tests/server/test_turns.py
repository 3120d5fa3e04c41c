"""Sessions that share an engine: whose chunk is next, and that a turn is never lost."""

from __future__ import annotations

import asyncio

import pytest

from lingbot_rt.server.turns import Turns


class Run:
    """A chunk that is finished when it is told so."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def finished(self) -> float:
        await self.over.wait()
        return 0.0


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_earliest_due_goes_first_and_equals_in_order():
    turns, started, runs = Turns(), [], {}

    async def client(name: str, due_at: float) -> None:
        def start():
            started.append(name)
            runs[name] = Run()
            return name, runs[name]

        assert (await turns.begin(due_at, start)) == (name, runs[name])

    async with asyncio.TaskGroup() as tasks:
        for name, due_at in [("a", 9.0), ("late", 5.0), ("b", 2.0), ("early", 1.0), ("c", 2.0)]:
            tasks.create_task(client(name, due_at))
            await settle()
        for expected in ["a", "early", "b", "c", "late"]:
            assert started[-1] == expected
            runs[expected].over.set()
            await settle()
    assert started == ["a", "early", "b", "c", "late"]
    await client("next", 0.0)
    assert started[-1] == "next"


async def test_a_session_that_always_wants_more_lets_another_in():
    """One is due in a second, and the others ask again and again for now: the second passes, and it gets its turn."""
    turns, started, now = Turns(), [], 0.0

    async def greedy(name: str) -> None:
        nonlocal now
        while "patient" not in started:
            run = Run()
            await turns.begin(now, lambda run=run: (started.append(name), run))
            now += 0.3
            run.over.set()
            await run.finished()

    async def patient() -> None:
        run = Run()
        await turns.begin(1.0, lambda: (started.append("patient"), run))
        run.over.set()

    async with asyncio.TaskGroup() as tasks:
        for work in (greedy("a"), greedy("b"), patient()):
            tasks.create_task(work)
    assert 3 <= started.index("patient") <= 6
    assert {"a", "b"} <= set(started)


@pytest.mark.parametrize("when", ["waiting", "granted", "starting"])
async def test_who_leaves_loses_no_turn(when):
    turns, first = Turns(), Run()
    await turns.begin(0.0, lambda: ("first", first))

    def fails():
        raise RuntimeError("no chunk")

    leaving = asyncio.create_task(turns.begin(0.0, fails))
    staying = asyncio.create_task(turns.begin(1.0, lambda: ("second", Run())))
    await settle()
    if when == "waiting":
        leaving.cancel()
        await settle()
    first.over.set()
    if when == "granted":
        await asyncio.sleep(0)
        assert len(turns._waiting) == 1
        leaving.cancel()
    with pytest.raises(RuntimeError if when == "starting" else asyncio.CancelledError):
        await leaving
    async with asyncio.timeout(5):
        assert (await staying)[0] == "second"
