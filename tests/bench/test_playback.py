"""Playback figures from arrival times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingbot_rt.bench.figures import Spread, number, significant, spread_of, table
from lingbot_rt.bench.playback import Arrival, event_latencies_ms, jitter_ms, play


def test_steady_frames_never_run_out():
    """Frames that arrive at the playback rate need no lead and have no jitter."""
    times = [5 + i / 16 for i in range(50)]
    playback = play(times, fps=16, lead_s=1e-6)
    assert (playback.underruns, playback.held_s) == (0, 0)
    assert playback.smooth_lead_s == pytest.approx(0, abs=1e-9)
    assert jitter_ms(times) == pytest.approx(0, abs=1e-6)


def test_a_gap_is_one_underrun():
    """One frame half a second late is one underrun, shortened by the lead. Later frames arrive on time."""
    times = [i / 10 for i in range(10)] + [1.5 + i / 10 for i in range(10)]
    playback = play(times, fps=10, lead_s=0.2)
    assert playback.underruns == 1
    assert playback.held_s == pytest.approx(0.3)
    assert playback.smooth_lead_s == pytest.approx(0.5)


def test_a_slow_stream_underruns_again_and_again():
    """Ten frames/s shown at twenty: once the lead is used up, every frame is late."""
    playback = play([i / 10 for i in range(21)], fps=20, lead_s=0.49)
    assert playback.underruns == 11
    assert playback.held_s == pytest.approx(20 / 10 - 20 / 20 - 0.49)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40).map(sorted), st.floats(1, 60))
def test_the_smooth_lead_is_enough_and_no_more(times, fps):
    """There is no underrun with the smooth lead, and one with a little less."""
    smooth = play(times, fps, 0.0).smooth_lead_s
    assert play(times, fps, smooth + 1e-6).underruns == 0
    if smooth > 1e-3:
        assert play(times, fps, smooth - 1e-3).underruns > 0


def test_groups_are_jitter():
    """Frames that arrive in groups of four have the jitter of a sawtooth of 4 steps."""
    times = [i // 4 * 0.4 for i in range(400)]
    assert jitter_ms(times) == pytest.approx(1000 * 0.1 * (1.25**0.5), rel=0.01)
    assert jitter_ms(times[:2]) is None


def test_events_are_timed_to_their_first_frame():
    """An event's latency ends at the first frame with its id or a newer one. Without such a frame it is left out."""
    frames = [Arrival(1.0, 0, None), Arrival(2.0, 1, 1), Arrival(2.1, 1, 1), Arrival(3.0, 2, 3)]
    assert event_latencies_ms(frames, [(1, 1.5), (2, 1.75), (3, 2.5), (4, 2.9)]) == [500, 1250, 500]


def test_spread_and_cells():
    """Percentiles are interpolated. No measurement gives None, and a dash in an aligned table."""
    spread = Spread.of([1, 2, 3, 4, 5])
    assert (spread.mean, spread.p50, spread.p95, spread.count) == (3, 3, pytest.approx(4.8), 5)
    assert spread_of([]) is None
    with pytest.raises(ValueError, match="no measurement"):
        Spread.of([])
    assert (number(None), number(1234.56), significant(None), significant(0.00012345)) == (
        "-",
        "1,234.6",
        "-",
        "0.0001234",
    )
    assert (
        table(("a", "ms"), [["long name", "1.0"], ["b", "12.0"]]) == "a            ms\nlong name   1.0\nb          12.0"
    )
