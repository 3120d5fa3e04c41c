"""The outbox bounds what waits, keeps the order, and gives up on a client that does not read."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_rt.errors import ClientTooSlow
from lingbot_rt.transport.outbox import HeadStart, Outbox, Pacer, Parcel


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new_outbox(**changes) -> Outbox:
    return Outbox(**({"max_parcels": 4, "max_bytes": 100, "send_timeout_s": 5} | changes))


@given(st.lists(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=2), max_size=20))
@settings(deadline=None, max_examples=50)
def test_everything_arrives_in_order_within_bounds(parcels):
    """Whatever is put comes out in order; at most four parcels and 100 bytes wait, unless one parcel is larger."""

    async def scenario():
        outbox, sent, waiting = new_outbox(), [], []

        async def send(message: bytes) -> None:
            await asyncio.sleep(0)
            waiting.append((outbox.parcels, outbox._bytes))
            sent.append(message)

        async with asyncio.TaskGroup() as group:
            group.create_task(outbox.pump(send))
            for messages in parcels:
                await outbox.put(Parcel(tuple(messages)))
            await outbox.close()
        assert sent == [message for messages in parcels for message in messages]
        assert all(count <= 4 and (size <= 100 or count == 1) for count, size in waiting)

    asyncio.run(scenario())


async def test_a_full_outbox_holds_its_generator():
    """put waits while there is no room and goes on when a parcel has left."""
    outbox, gate = new_outbox(max_parcels=1), asyncio.Event()

    async def send(message: bytes) -> None:
        await gate.wait()

    pump = asyncio.create_task(outbox.pump(send))
    await outbox.put(Parcel((b"1",)))
    second = asyncio.create_task(outbox.put(Parcel((b"2",))))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not second.done()
    gate.set()
    await second
    await outbox.close()
    await pump


async def test_bytes_are_bounded_too():
    """A parcel that would go over the byte limit waits; one larger than the limit goes in alone."""
    outbox, sent = new_outbox(max_bytes=100), []

    async def send(message: bytes) -> None:
        sent.append(len(message))

    for first, second, waits in ((60, 40, False), (60, 41, True), (300, 1, True)):
        await outbox.put(Parcel((b"x" * first,)))
        put = asyncio.create_task(outbox.put(Parcel((b"x" * second,))))
        await asyncio.sleep(0)
        assert put.done() != waits
        pump = asyncio.create_task(outbox.pump(send))
        await put
        await outbox.wait_for_at_most(0)
        pump.cancel()
    assert sent == [60, 40, 60, 41, 300, 1]


async def test_a_client_that_does_not_read_is_given_up():
    """A send that takes longer than the limit raises ClientTooSlow, which names the flag."""
    outbox = new_outbox(send_timeout_s=0.01)

    async def send(message: bytes) -> None:
        await asyncio.Event().wait()

    await outbox.put(Parcel((b"1",)))
    with pytest.raises(ClientTooSlow, match="--send-timeout-s"):
        await outbox.pump(send)


async def test_a_parcel_waits_until_it_is_due_and_tells_its_times():
    """Nothing leaves before its time; on_sent hears how long pacing and sending took."""
    outbox, heard, order = new_outbox(), [], []
    loop = asyncio.get_running_loop()
    due = loop.time() + 0.05

    async def send(message: bytes) -> None:
        order.append((message, loop.time()))

    await outbox.put(Parcel((b"head", b"body"), due=due, on_sent=heard.append))
    await outbox.close()
    await outbox.pump(send)
    assert [message for message, _ in order] == [b"head", b"body"]
    assert order[0][1] >= due - 0.001
    assert heard[0].pace_wait_ms > 0
    assert outbox.parcels == 0


async def test_times_tell_header_from_payload():
    """The first message's time is the header's, the others' the payload's; without pacing nothing was held back."""
    outbox, heard = new_outbox(), []

    async def send(message: bytes) -> None:
        await asyncio.sleep(0.02 if message == b"body" else 0)

    await outbox.put(Parcel((b"head", b"body"), on_sent=heard.append))
    await outbox.put(Parcel((b"whole",), on_sent=heard.append))
    await outbox.close()
    await outbox.pump(send)
    assert heard[0].raw_write_ms > heard[0].header_write_ms
    assert heard[1].raw_write_ms == 0
    assert heard[0].pace_wait_ms < heard[0].raw_write_ms
    assert heard[0].sent_at <= heard[1].sent_at


async def test_a_cancelled_put_leaves_nothing_behind():
    """A generator cancelled while it waits for room has put nothing; the room is the next one's."""
    outbox, sent = new_outbox(max_parcels=1), []

    async def send(message: bytes) -> None:
        sent.append(message)

    await outbox.put(Parcel((b"1",)))
    waiting = asyncio.create_task(outbox.put(Parcel((b"2",))))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    pump = asyncio.create_task(outbox.pump(send))
    await outbox.put(Parcel((b"3",)))
    await outbox.close()
    await pump
    assert sent == [b"1", b"3"]


async def test_close_frees_a_waiting_generator():
    """A put that waits for room when the outbox closes ends with an error, not never; what is inside still goes out."""
    outbox, sent = new_outbox(max_parcels=1), []

    async def send(message: bytes) -> None:
        sent.append(message)

    await outbox.put(Parcel((b"1",)))
    waiting = asyncio.create_task(outbox.put(Parcel((b"2",))))
    await asyncio.sleep(0)
    await outbox.close()
    with pytest.raises(RuntimeError, match="closed"):
        await waiting
    await outbox.pump(send)
    assert sent == [b"1"]


async def test_what_the_socket_raises_comes_through():
    """An error of send is the pump's error; it is not taken for a slow client."""
    outbox = new_outbox()

    async def send(message: bytes) -> None:
        raise ConnectionResetError("gone")

    await outbox.put(Parcel((b"1",)))
    with pytest.raises(ConnectionResetError):
        await outbox.pump(send)


async def test_waiting_for_the_outbox_to_drain():
    """wait_for_at_most returns when enough has been sent, and put after close is an error."""
    outbox = new_outbox()
    for _ in range(3):
        await outbox.put(Parcel((b"x",)))

    async def send(message: bytes) -> None:
        await asyncio.sleep(0)

    pump = asyncio.create_task(outbox.pump(send))
    await outbox.wait_for_at_most(1)
    assert outbox.parcels <= 1
    await outbox.close()
    await pump
    with pytest.raises(RuntimeError, match="closed"):
        await outbox.put(Parcel((b"late",)))


async def test_hurry_sends_what_waits_for_its_time():
    """After hurry the parcels here leave at once and in order; one put later keeps its own time."""
    outbox, sent = new_outbox(), []
    loop = asyncio.get_running_loop()

    async def send(message: bytes) -> None:
        sent.append((message, loop.time()))

    pump = asyncio.create_task(outbox.pump(send))
    for name in (b"1", b"2"):
        await outbox.put(Parcel((name,), due=loop.time() + 3600))
    await asyncio.sleep(0)
    outbox.hurry()
    later = loop.time() + 0.05
    await outbox.put(Parcel((b"3",), due=later))
    await outbox.close()
    await pump
    assert [message for message, _ in sent] == [b"1", b"2", b"3"]
    assert sent[1][1] < later <= sent[2][1] + 0.001


async def test_last_words_pass_what_waits():
    """The parcel in work goes at once, what waits and what comes later is forgotten, other last words too."""
    outbox, sent = new_outbox(), []
    far = asyncio.get_running_loop().time() + 3600

    async def send(message: bytes) -> None:
        sent.append(message)

    pump = asyncio.create_task(outbox.pump(send))
    for name in (b"in work", b"waits", b"waits too"):
        await outbox.put(Parcel((name,), due=far))
    await asyncio.sleep(0)
    await outbox.last_words(Parcel((b"last words",)))
    await outbox.put(Parcel((b"late",)))
    await outbox.last_words(Parcel((b"more last words",)))
    await outbox.close()
    await outbox.put(Parcel((b"later",)))
    await pump
    assert sent == [b"in work", b"last words"]
    assert outbox._bytes == 0


def test_pacing_spaces_frames_by_fps():
    """Frames leave at fps on average, the first at once."""
    clock = Clock()
    pacer = Pacer(10, clock)
    assert [pacer.due(4, None) for _ in range(3)] == pytest.approx([100.0, 100.4, 100.8])
    assert pacer.worth_starting_at(0.25) == pytest.approx(100.95)


def test_a_stream_that_fell_behind_does_not_burst():
    """After a pause the next frames leave at once and the spacing starts over."""
    clock = Clock()
    pacer = Pacer(10, clock)
    pacer.due(4, None)
    clock.now = 105.0
    assert pacer.due(4, None) == 105.0
    assert pacer.due(4, None) == 105.4


def test_a_new_event_is_shown_at_once():
    """A new event id resets the clock; the same one does not."""
    clock = Clock()
    pacer = Pacer(10, clock)
    pacer.due(40, None)
    assert pacer.due(4, 7) == 100.0
    assert pacer.due(4, 7) == 100.4


def test_a_head_start_is_spent_and_grows_back():
    """Early starts are free while the credit lasts; then each waits until its earliness and the credit meet."""
    clock = Clock()
    head_start = HeadStart(1.0, clock)
    for _ in range(2):
        assert head_start.wait_s(0.5) == 0
        head_start.spend(0.5)
    assert head_start.wait_s(0.5) == 0.25
    clock.now += 0.25
    assert head_start.wait_s(0.25) == 0
    head_start.spend(0.25)
    clock.now += 60
    assert head_start.wait_s(1.0) == 0
    assert head_start.wait_s(1.5) == 0.25


def test_events_without_end_run_a_stream_at_twice_its_pace():
    """A chunk plays for a second and an event always waits: in the long run chunks start half a second apart."""
    clock = Clock()
    head_start, due, starts = HeadStart(2.0, clock), clock.now, []
    for _ in range(40):
        clock.now += head_start.wait_s(due - clock.now)
        head_start.spend(due - clock.now)
        starts.append(clock.now)
        due = clock.now + 1.0
        clock.now += 0.1  # the engine is quick
    assert starts[-1] - starts[-11] == pytest.approx(5.0)


@given(
    st.floats(1, 240),
    st.lists(st.tuples(st.integers(1, 16), st.none() | st.integers(0, 3), st.floats(0, 2)), max_size=40),
)
def test_a_paced_stream_is_never_faster_than_fps(fps, sent):
    """Nothing is due in the past, and n frames hold the next ones back by n/fps unless an event came.

    And a chunk started when it is worth starting has its first frames due exactly when they are there.
    """
    clock = Clock()
    pacer, event, free_at = Pacer(fps, clock), None, 0.0
    for count, event_id, pause in sent:
        clock.now += pause
        due = pacer.due(count, event_id)
        assert due == (clock.now if event_id != event else max(clock.now, free_at))
        event, free_at = event_id, due + count / fps
        assert pacer.worth_starting_at(0.5) + 0.5 == pytest.approx(free_at)
