"""The outbox keeps together what belongs together, and tells what sending took."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from lingbot_rt.session.session import SendTimes
from lingbot_rt.transport import outbox as outbox_module
from lingbot_rt.transport.outbox import Outbox


async def test_groups_of_several_tasks_never_mix():
    """Header and payload stay side by side however many tasks send at once; groups leave in the order of the calls."""
    sent = []

    async def write(data: bytes, *, more: bool) -> None:
        await asyncio.sleep(0)
        sent.append((data, more))

    outbox = Outbox(write)
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(outbox.send(b"header %d" % number, b"payload %d" % number))
            tasks.create_task(outbox.send(b"ack %d" % number))
    expected = []
    for number in range(20):
        expected += [(b"header %d" % number, True), (b"payload %d" % number, False), (b"ack %d" % number, False)]
    assert sent == expected


async def test_a_sender_waits_for_the_socket():
    """Nothing is queued: whoever sends to a client that does not read waits, and so does everybody behind."""
    gate, sent = asyncio.Event(), []

    async def write(data: bytes, *, more: bool) -> None:
        await gate.wait()
        sent.append(data)

    outbox = Outbox(write)
    senders = [asyncio.create_task(outbox.send(name)) for name in (b"1", b"2")]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(sender.done() for sender in senders)
    gate.set()
    await asyncio.gather(*senders)
    assert sent == [b"1", b"2"]


async def test_a_cancelled_sender_frees_the_way():
    """One that is cancelled in mid-send lets the next one through."""
    gate, sent = asyncio.Event(), []

    async def write(data: bytes, *, more: bool) -> None:
        if data == b"stuck":
            await gate.wait()
        sent.append(data)

    outbox = Outbox(write)
    stuck = asyncio.create_task(outbox.send(b"stuck"))
    following = asyncio.create_task(outbox.send(b"following"))
    await asyncio.sleep(0)
    stuck.cancel()
    await following
    assert sent == [b"following"]


async def test_times_tell_header_from_payload(monkeypatch):
    """The first message's time is the header's, the others' the payload's."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(outbox_module, "time", clock)

    async def write(data: bytes, *, more: bool) -> None:
        clock.now += {b"head": 0.25, b"body": 0.5, b"whole": 1.0}[data]

    outbox = Outbox(write)
    assert await outbox.send(b"head", b"body", b"body") == SendTimes(250.0, 1000.0, 101.25)
    assert await outbox.send(b"whole") == SendTimes(1000.0, 0.0, 102.25)


async def test_what_the_socket_raises_comes_through():
    """An error of the socket is the sender's error, and nothing more of its group is written."""
    written = []

    async def write(data: bytes, *, more: bool) -> None:
        written.append(data)
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        await Outbox(write).send(b"head", b"body")
    assert written == [b"head"]
