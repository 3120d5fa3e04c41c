"""When frames may leave and when a chunk is worth starting, on a clock of the test's own where that is possible."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingbot_rt.transport.pacing import Pacer, TokenBucket

LIMIT_S = 30


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pacing_spaces_frames_by_fps():
    """Frames leave at fps on average, the first at once."""
    clock = Clock()
    pacer = Pacer(10, 12, clock)
    assert [pacer.due(4, None) for _ in range(3)] == pytest.approx([100.0, 100.4, 100.8])
    assert pacer.worth_starting_at(0.25) == pytest.approx(100.95)


def test_frames_of_a_started_chunk_count_before_they_are_there():
    """A chunk that follows one in work is worth starting when that one's frames will have been shown."""
    clock = Clock()
    pacer = Pacer(10, 12, clock)
    pacer.plan(12)
    assert pacer.worth_starting_at(0.25) == pytest.approx(100.95)
    pacer.due(4, None)
    assert pacer.worth_starting_at(0.25) == pytest.approx(100.95)
    pacer.wake()
    assert pacer.worth_starting_at(0.25) == pytest.approx(100.15)


def test_a_stream_that_fell_behind_does_not_burst():
    """After a pause the next frames leave at once and the spacing starts over."""
    clock = Clock()
    pacer = Pacer(10, 12, clock)
    pacer.due(4, None)
    clock.now = 105.0
    assert pacer.due(4, None) == 105.0
    assert pacer.due(4, None) == 105.4


def test_a_new_event_is_shown_at_once():
    """A new event id resets the clock; the same one does not."""
    clock = Clock()
    pacer = Pacer(10, 12, clock)
    pacer.due(40, None)
    assert pacer.due(4, 7) == 100.0
    assert pacer.due(4, 7) == 100.4


def test_an_event_frees_what_was_planned_before_it():
    """Frames of chunks that had started when the event came leave at once; those of the next chunk are paced."""
    clock = Clock()
    pacer = Pacer(10, 12, clock)
    pacer.plan(12)
    pacer.due(4, None)
    pacer.wake()
    assert [pacer.due(4, None) for _ in range(2)] == [100.0, 100.0]
    pacer.plan(12)
    assert [pacer.due(4, 7) for _ in range(3)] == pytest.approx([100.0, 100.4, 100.8])


async def test_an_event_ends_the_wait_of_due_frames():
    """Frames that wait for their time, hours away, leave when an event comes, and so do those behind them."""
    pacer = Pacer(0.001, 12)
    pacer.plan(12)
    await pacer.until_due(4, None)
    waiting = asyncio.create_task(pacer.until_due(4, None))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    pacer.wake()
    assert await asyncio.wait_for(waiting, LIMIT_S) >= 5
    await asyncio.wait_for(pacer.until_due(4, None), LIMIT_S)


async def test_an_event_starts_a_chunk_early():
    """The wait for the right moment, hours away, ends with an event; one that came before it ends it at once."""
    pacer = Pacer(0.001, 12)
    pacer.plan(12)
    waiting = asyncio.create_task(pacer.until_worth_starting(0.1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    pacer.wake()
    await asyncio.wait_for(waiting, LIMIT_S)
    pacer.plan(12)
    pacer.wake()
    await asyncio.wait_for(pacer.until_worth_starting(0.1), LIMIT_S)


async def test_a_late_chunk_starts_at_once():
    """The first chunk of a session, and any whose frames are already due, do not wait."""
    pacer = Pacer(0.001, 12)
    await asyncio.wait_for(pacer.until_worth_starting(0.0), LIMIT_S)
    pacer.plan(12)
    for _ in range(3):
        pacer.due(4, None)
    await asyncio.wait_for(pacer.until_worth_starting(13_000), LIMIT_S)


def test_a_full_bucket_is_spent_and_fills_up_again():
    """Early starts are free while the bucket lasts; then each waits until its earliness and the level meet."""
    clock = Clock()
    bucket = TokenBucket(1.0, clock)
    for _ in range(2):
        assert bucket.wait_s(0.5) == 0
        bucket.spend(0.5)
    assert bucket.wait_s(0.5) == 0.25
    clock.now += 0.25
    assert bucket.wait_s(0.25) == 0
    bucket.spend(0.25)
    clock.now += 60
    assert bucket.wait_s(1.0) == 0
    assert bucket.wait_s(1.5) == 0.25


def test_events_without_end_run_a_stream_at_twice_its_pace():
    """A chunk plays for a second and an event always waits: in the long run chunks start half a second apart."""
    clock = Clock()
    bucket, due, starts = TokenBucket(2.0, clock), clock.now, []
    for _ in range(40):
        clock.now += bucket.wait_s(due - clock.now)
        bucket.spend(due - clock.now)
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
    pacer, event, free_at = Pacer(fps, 12, clock), None, 0.0
    for count, event_id, pause in sent:
        clock.now += pause
        due = pacer.due(count, event_id)
        assert due == (clock.now if event_id != event else max(clock.now, free_at))
        event, free_at = event_id, due + count / fps
        assert pacer.worth_starting_at(0.5) + 0.5 == pytest.approx(free_at)
