"""The slot and its line, without sockets."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_rt.errors import SessionBusy
from lingbot_rt.server.admission import Admission


@pytest.fixture
async def no_waiting(monkeypatch) -> None:
    """Time passes at once when nothing is left to do, and only then: a busy machine changes nothing."""
    loop = asyncio.get_running_loop()
    clock = SimpleNamespace(now=loop.time())
    select = loop._selector.select

    def pass_time(timeout: float | None = None) -> list:
        clock.now += timeout or 0.0
        return select(None if timeout is None else 0)

    monkeypatch.setattr(loop, "time", lambda: clock.now)
    monkeypatch.setattr(loop._selector, "select", pass_time)


async def ignore_place(position: int, waited_s: float) -> None:
    """For clients that wait in line."""


async def hold(admission: Admission, entered: asyncio.Event, leave: asyncio.Event) -> None:
    async with admission.slot():
        entered.set()
        await leave.wait()


async def test_the_slot_is_passed_on_in_order():
    """Clients get the slot in the order in which they came, and learn each new place in line."""
    admission = Admission(wait_s=0, max_waiting=9)
    served, places = [], []

    async def client(name: str) -> None:
        async def tell_place(position: int, waited_s: float) -> None:
            places.append((name, position))

        async with admission.slot(tell_place):
            served.append(name)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        for name in "abc":
            tasks.create_task(client(name))
    assert served == ["a", "b", "c"]
    assert places == [("b", 1), ("c", 2), ("b", 0), ("c", 1), ("c", 0)]
    assert not admission.is_busy


@pytest.mark.usefixtures("no_waiting")
async def test_the_wait_is_limited():
    """After ``wait_s`` the client is refused and no longer in line."""
    admission, loop = Admission(wait_s=5, max_waiting=9), asyncio.get_running_loop()
    async with admission.slot():
        begin = loop.time()
        with pytest.raises(SessionBusy):
            async with admission.slot():
                pass
        assert loop.time() - begin == pytest.approx(5)
        assert admission.waiting == 0
    assert not admission.is_busy


async def test_without_a_wait_the_refusal_is_immediate():
    """With --session-wait-s 0 nobody waits."""
    admission = Admission(wait_s=0, max_waiting=9)
    async with admission.slot():
        with pytest.raises(SessionBusy):
            async with admission.slot():
                pass


@pytest.mark.usefixtures("no_waiting")
async def test_a_leaving_holder_extends_the_wait():
    """A client that waits for a session that is ending is refused only after ``leaving_limit_s`` more."""
    admission, loop = Admission(wait_s=5, max_waiting=9, leaving_limit_s=30), asyncio.get_running_loop()
    async with admission.slot() as slot:
        slot.leaving()
        waiter = asyncio.create_task(hold(admission, entered := asyncio.Event(), leave := asyncio.Event()))
        await asyncio.sleep(34)
        assert not waiter.done()
    await asyncio.wait_for(entered.wait(), 1)
    leave.set()
    await waiter
    async with admission.slot() as slot:
        slot.leaving()
        begin = loop.time()
        with pytest.raises(SessionBusy):
            async with admission.slot():
                pass
        assert loop.time() - begin == pytest.approx(35, abs=0.06)


@pytest.mark.usefixtures("no_waiting")
async def test_only_the_next_in_line_waits_longer():
    """The next in line becomes the holder. The client behind it is refused after its wait as usual."""
    admission = Admission(wait_s=5, max_waiting=9)
    async with admission.slot() as slot:
        slot.leaving()
        first = asyncio.create_task(hold(admission, entered := asyncio.Event(), leave := asyncio.Event()))
        await asyncio.sleep(0)
        second = asyncio.create_task(hold(admission, asyncio.Event(), leave))
        await asyncio.sleep(10)
        assert not second.done()
    await entered.wait()
    with pytest.raises(SessionBusy):
        await second
    leave.set()
    await first


@pytest.mark.usefixtures("no_waiting")
async def test_a_client_in_line_waits_as_long_as_it_takes():
    """The wait has no limit. The client hears its place at once and then every five seconds, with the time so far."""
    admission, heard = Admission(wait_s=1, max_waiting=9), []

    async def tell_place(position: int, waited_s: float) -> None:
        heard.append((position, waited_s))

    async def client() -> None:
        async with admission.slot(tell_place):
            pass

    async with admission.slot():
        waiting = asyncio.create_task(client())
        await asyncio.sleep(7202)
        assert not waiting.done()
    await waiting
    assert heard == [*((1, pytest.approx(5 * number)) for number in range(1441)), (0, pytest.approx(7202))]


@pytest.mark.usefixtures("no_waiting")
async def test_who_leaves_the_line_moves_the_others_up():
    """The places behind are told at once. The order stays that of coming, also among clients with a limited wait."""
    admission, served, places = Admission(wait_s=60, max_waiting=9), [], []

    async def client(name: str) -> None:
        async def tell_place(position: int, waited_s: float) -> None:
            places.append((name, position))

        async with admission.slot(None if name == "brief" else tell_place):
            served.append(name)

    async with admission.slot():
        tasks = {}
        for name in ("first", "brief", "second", "third"):
            tasks[name] = asyncio.create_task(client(name))
            await asyncio.sleep(0)
        places.clear()
        tasks["first"].cancel()
        await asyncio.sleep(0.1)
        assert places == [("second", 2), ("third", 3)]
        assert admission.waiting == 3
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert served == ["brief", "second", "third"]


@pytest.mark.usefixtures("no_waiting")
async def test_the_line_is_bounded():
    """Whoever finds it full is refused after ``wait_s`` with words that name the flag. A place that is left is free."""
    admission = Admission(wait_s=5, max_waiting=1)

    async def client() -> None:
        async with admission.slot(ignore_place):
            pass

    async with admission.slot():
        in_line = asyncio.create_task(client())
        await asyncio.sleep(0)
        with pytest.raises(SessionBusy, match=r"--max-waiting 1"):
            await client()
        in_line.cancel()
        await asyncio.sleep(0)
        later = asyncio.create_task(client())
        await asyncio.sleep(10)
        assert not later.done()
    await later


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=8))
async def test_the_slot_never_gets_lost(clients):
    """Whenever clients come, leave or are cancelled, there is one holder at a time, and the slot is free at the end."""
    admission = Admission(wait_s=1, max_waiting=1)
    holders = 0

    async def client(begin: int, stay: int) -> None:
        nonlocal holders
        for _ in range(begin):
            await asyncio.sleep(0)
        async with admission.slot(ignore_place if stay % 2 else None):
            holders += 1
            assert holders == 1
            try:
                for _ in range(stay):
                    await asyncio.sleep(0)
            finally:
                holders -= 1

    tasks = [asyncio.create_task(client(begin, stay)) for begin, stay, _ in clients]
    for number, (_, _, cancelled) in enumerate(clients):
        if cancelled:
            for _ in range(number):
                await asyncio.sleep(0)
            tasks[number].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
    assert not admission.is_busy
    assert admission.waiting == 0


async def test_several_slots_are_passed_on_one_by_one():
    """Two sessions run at a time; the third waits for whichever ends first."""
    admission, served = Admission(wait_s=0, max_waiting=9, slots=2), []
    leave = {name: asyncio.Event() for name in "abcd"}

    async def client(name: str) -> None:
        async with admission.slot(ignore_place):
            served.append(name)
            await leave[name].wait()

    async with asyncio.TaskGroup() as tasks:
        for name in "abcd":
            tasks.create_task(client(name))
            await asyncio.sleep(0)
        assert (served, admission.is_busy, admission.running, admission.waiting) == (["a", "b"], True, 2, 2)
        for name, expected in [("b", "abc"), ("a", "abcd"), ("d", "abcd")]:
            leave[name].set()
            for _ in range(5):
                await asyncio.sleep(0)
            assert served == list(expected)
        assert (admission.is_busy, admission.running) == (False, 1)
        leave["c"].set()
