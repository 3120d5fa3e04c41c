"""Sessions that share an engine: whose chunk is next, and that a turn is never lost."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from lingbot_rt.server.admission import Admission
from lingbot_rt.server.turns import Turns
from tests.server.conftest import event, init, saved, state, wait_until
from tests.server.fake_engine import FakeEngine, frame


class Started:
    """A chunk that is finished when it is told so; its own run."""

    def __init__(self, name: str = "") -> None:
        self.name, self.over = name, asyncio.Event()

    @property
    def run(self) -> Started:
        return self

    async def finished(self) -> float:
        await self.over.wait()
        return 0.0


@pytest.fixture
def turns() -> Turns:
    return Turns(Admission(wait_s=0, max_waiting=0, slots=9))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_earliest_due_goes_first_and_equals_in_order(turns):
    started: list[Started] = []

    async def client(name: str, due_at: float) -> None:
        def start() -> Started:
            started.append(Started(name))
            return started[-1]

        assert (await turns.begin(due_at, start)).name == name

    async with asyncio.TaskGroup() as tasks:
        for name, due_at in [("a", 9.0), ("late", 5.0), ("b", 2.0), ("early", 1.0), ("c", 2.0)]:
            tasks.create_task(client(name, due_at))
            await settle()
        for expected in ["a", "early", "b", "c", "late"]:
            assert started[-1].name == expected
            started[-1].over.set()
            await settle()
    await client("next", 0.0)
    assert [each.name for each in started] == ["a", "early", "b", "c", "late", "next"]


async def test_a_session_that_always_wants_more_lets_another_in(turns):
    """One is due in a second, and the others ask again and again for now: the second passes, and it gets its turn."""
    order, now = [], 0.0

    async def greedy(name: str) -> None:
        nonlocal now
        while "patient" not in order:
            started = Started()
            await turns.begin(now, lambda started=started: (order.append(name), started)[1])
            now += 0.3
            started.over.set()
            await started.finished()

    async def patient() -> None:
        started = Started()
        await turns.begin(1.0, lambda: (order.append("patient"), started)[1])
        started.over.set()

    async with asyncio.TaskGroup() as tasks:
        for work in (greedy("a"), greedy("b"), patient()):
            tasks.create_task(work)
    assert 3 <= order.index("patient") <= 6
    assert {"a", "b"} <= set(order)


@pytest.mark.parametrize("when", ["waiting", "granted", "starting", "nothing to start"])
async def test_who_leaves_loses_no_turn(turns, when):
    first = Started()
    await turns.begin(0.0, lambda: first)

    def fails() -> Started | None:
        if when == "nothing to start":
            return None
        raise RuntimeError("no chunk")

    leaving = asyncio.create_task(turns.begin(0.0, fails))
    staying = asyncio.create_task(turns.begin(1.0, lambda: Started("second")))
    await settle()
    if when == "waiting":
        leaving.cancel()
        await settle()
    first.over.set()
    if when == "granted":
        await asyncio.sleep(0)
        assert len(turns._waiting) == 1
        leaving.cancel()
    if when == "nothing to start":
        assert await leaving is None
    else:
        with pytest.raises(RuntimeError if when == "starting" else asyncio.CancelledError):
            await leaving
    async with asyncio.timeout(5):
        assert (await staying).name == "second"


async def test_two_clients_share_the_engine(serve):
    """Chunk by chunk in turn, each with its own frames, and told how many they are; a third one waits in line."""
    server = await serve(FakeEngine(group_s=0.002), max_sessions=2)
    server.engine.may_open.clear()  # until all have come: a session alone plays several chunks in a row
    asked = {"max_chunks": 6, "protocol_extensions": ["session", "queue"]}
    other = saved(np.full((64, 64, 3), 77, np.uint8))
    async with (
        server.client(init(**asked)) as first,
        server.client(init(**asked, first_frame=other)) as second,
        server.client(init(**asked), max_queue=None) as third,  # it leaves without reading its frames
    ):
        assert (await third.until("queue"))["position"] == 1
        await wait_until(lambda: len(server.engine._cancelled) == 2)
        server.engine.may_open.set()
        for client in (first, second):
            await client.until("session")
        chunks = [(await first.chunk(), await second.chunk()) for _ in range(6)]
        assert (await third.until("session"))["type"] == "session"
    plans, ids = server.engine.plans, [plan.session_id for plan in server.engine.opened]
    for number, session in enumerate(server.engine.opened[:2]):
        frames = [pixels for pair in chunks for pixels in pair[number].frames]
        assert all(np.array_equal(pixels, frame(session, index)) for index, pixels in enumerate(frames))
        assert [pair[number].stats["chunk_index"] for pair in chunks] == list(range(6))
    order = "".join("ab?"[ids.index(plan.session_id)] for plan in plans if plan.session_id in ids[:2])
    assert "abab" in order or "baba" in order, order
    assert "aaa" not in order.rstrip("a"), order
    stats = [each.stats for pair in chunks for each in pair]
    assert 2 in {each["sessions"] for each in stats}
    assert all(each["turn_wait_ms"] >= 0 for each in stats)


async def test_a_paused_session_leaves_its_turns_to_the_other(serve):
    server = await serve(FakeEngine(), max_sessions=2)
    async with server.client(init(protocol_extensions=["pause", "session"])) as idle:
        await idle.send(event("pause", event_id=1))
        await idle.until("session")
        async with server.client(init(max_chunks=9)) as busy:
            stats = [(await busy.chunk()).stats for _ in range(9)]
            assert await busy.closed() == (1000, "generation complete")
    own = [plan for plan in server.engine.plans if plan.session_id == server.engine.opened[-1].session_id]
    assert len(own) == 9
    assert "sessions" not in stats[0]
    await server.idle()


async def test_who_pauses_while_waiting_for_a_turn_starts_nothing(serve):
    """What comes up in the meantime counts: the turn goes on to the other, and later keys are in the next chunk."""
    server = await serve(FakeEngine(group_s=0.002), max_sessions=2)
    extensions = ["pause", "control_ack"]
    async with (
        server.client(init(max_chunks=40)) as busy,
        server.client(init(protocol_extensions=extensions), max_queue=None) as other,
    ):
        await other.chunk()
        await other.send(event("pause", event_id=5))
        while (await other.until("control_ack"))["state"] != "applied":
            pass
        paused_at = len(server.engine.plans)
        await other.send(event("camera_actions", state("w"), 6))
        await other.send(event("resume", event_id=7))
        for _ in range(40):
            await busy.chunk()
        while (await other.chunk()).stats["event_id"] != 6:
            pass
    mine = server.engine.opened[1].session_id
    assert any(plan.event_id == 6 for plan in server.engine.plans[paused_at:] if plan.session_id == mine)
