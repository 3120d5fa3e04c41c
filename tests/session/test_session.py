"""The session without sockets or engine: what a chunk is planned with."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session.messages import Event, Init
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.shapes import FrameSize
from tests.server.conftest import state
from tests.server.fake_engine import CARD

INIT = Init(prompt="A street.", first_frame=b"x", size="64x64")


def session(config: ServeConfig | None = None, **fields) -> Session:
    init = msgspec.structs.replace(INIT, **fields)
    return Session("s", resolve(init, CARD, config or ServeConfig()))


def keys(*held: str, event_id: int | None = None) -> Event:
    return Event(kind="camera_actions", payload=state(*held), event_id=event_id)


def test_defaults_are_the_protocols_and_the_models():
    """What an init leaves out: 832x480, 16 fps, seed 42, F, steps, sink and window of the model."""
    settings = resolve(Init(prompt="A street.", first_frame=b"x"), CARD, ServeConfig())
    assert settings.size == FrameSize(832, 480)
    assert (settings.fps, settings.seed, settings.latent_frames) == (16, 42, 3)
    assert (settings.num_steps, settings.sink_frames, settings.window_frames) == (4, 3, 9)
    assert (settings.guidance_scale, settings.max_chunks, settings.script) == (1, None, None)
    assert settings.output.name == "delta-gzip"


def test_the_operator_chooses_the_default_transport():
    """--default-output-format holds where an init names none, and only there."""
    config = ServeConfig(default_output_format="webp")
    assert session(config).settings.output.name == "webp"
    assert session(config, realtime_output_format="raw").settings.output.name == "raw"


@pytest.mark.parametrize(
    ("sink", "window", "num_frames", "expected"),
    [
        (None, None, 9, (3, 9)),
        (0, None, 9, (0, 9)),
        (9, 18, 9, (9, 18)),
        (None, 6, 9, (3, 6)),
        (None, 5, 9, None),
        (9, None, 9, (9, 12)),
        (None, None, 81, (3, 24)),
        (3, 3, 1, None),
        (3, 4, 1, (3, 4)),
    ],
)
def test_the_window_holds_sink_and_chunk(sink, window, num_frames, expected):
    """A window that was asked for must hold both; one that was not grows to it."""
    fields = {
        "realtime_causal_sink_size": sink,
        "realtime_causal_kv_cache_num_frames": window,
        "num_frames": num_frames,
    }
    if expected is None:
        with pytest.raises(InvalidInit, match="expected at least"):
            session(**fields)
    else:
        settings = session(**fields).settings
        assert (settings.sink_frames, settings.window_frames) == expected


def test_every_size_of_the_table_of_sizes():
    """Whole tokens between 64 pixels a side and --max-pixels pass; others name the nearest that would."""
    config = ServeConfig(max_pixels=832 * 480)
    for good in ("64x64", "832x480", "480x832", "128x2048"):
        assert str(session(config, size=good).settings.size) == good
    for bad, nearest in {"833x480": "832x480", "48x64": "64x64", "1280x720": None, "0x0": "64x64"}.items():
        with pytest.raises(InvalidInit) as refused:
            session(config, size=bad)
        named = FrameSize.parse(str(refused.value).rpartition(" ")[2])
        assert session(config, size=str(named))
        assert nearest is None or str(named) == nearest


def test_interpolated_frames_play_faster():
    """exp 2 gives four frames for one, so that the stream is paced at four times fps; off, exp has no say."""
    asked = Init(prompt="A street.", first_frame=b"x", fps=20, frame_interpolation_exp=2)
    assert resolve(asked, CARD, ServeConfig()).playback_fps == 20
    on = msgspec.structs.replace(asked, enable_frame_interpolation=True)
    assert resolve(on, CARD, ServeConfig()).playback_fps == 80


def test_events_wait_for_the_next_plan_and_no_longer():
    """Events are sampled when a chunk is planned: one that comes a moment later is in the next chunk."""
    it = session()
    first = it.next_plan()
    assert (first.plan.relative_poses, first.plan.event_id, first.new_event) == (None, None, False)
    it.receive(keys("w", event_id=3), now=10.0)
    second = it.next_plan()
    assert (second.plan.event_id, second.new_event, second.event_received_at) == (3, True, 10.0)
    assert np.linalg.norm(second.plan.relative_poses[1:, :3, 3], axis=-1) == pytest.approx(1)
    third = it.next_plan()
    assert (third.plan.event_id, third.new_event, third.event_received_at) == (3, False, None)
    assert [sampled.plan.chunk_index for sampled in (first, second, third)] == [0, 1, 2]


def test_a_prompt_event_is_in_force_from_the_next_chunk():
    """The prompt changes with the chunk that samples it and stays."""
    it = session()
    it.next_plan()
    it.receive(Event(kind="prompt", payload="A river."), now=0)
    assert [it.next_plan().plan.prompt for _ in range(2)] == ["A river.", "A river."]


def test_a_script_in_the_init_runs_from_the_first_chunk():
    """F entries a chunk, then neutral: the camera stands still, but camera control stays on."""
    it = session(condition_inputs={"camera_actions": [["w"]] * 4})
    moved = [np.linalg.norm(it.next_plan().plan.relative_poses[:, :3, 3], axis=-1) > 0 for _ in range(3)]
    assert [list(chunk) for chunk in moved] == [[False, True, True], [True, False, False], [False] * 3]


def test_a_composite_event_is_all_or_nothing():
    """When one half is wrong, neither half is applied."""
    it = session()
    it.next_plan()
    payload = {"input_types": ["prompt", "camera_actions"], "prompt": "A river.", "camera_actions": [["x"]]}
    with pytest.raises(InvalidEvent):
        it.receive(Event(kind="composite_input", payload=payload, event_id=1), now=0)
    plan = it.next_plan().plan
    assert (plan.prompt, plan.relative_poses, plan.event_id) == ("A street.", None, None)


def test_pause_is_an_event_only_for_those_who_asked():
    """Without the extension ``pause`` it is an unknown kind; with it, the session says that it is paused."""
    plain = session()
    with pytest.raises(InvalidEvent, match="unsupported event kind"):
        plain.receive(Event(kind="pause"), now=0)
    assert not plain.is_paused
    asked = session(protocol_extensions=("pause",))
    asked.receive(Event(kind="pause"), now=0)
    assert asked.is_paused
    asked.receive(Event(kind="resume"), now=0)
    assert not asked.is_paused


def test_max_chunks_counts_plans():
    """The session is complete when as many chunks as asked for have been planned."""
    it = session(max_chunks=2)
    assert not it.is_complete
    it.next_plan()
    it.next_plan()
    assert it.is_complete


@pytest.mark.parametrize(
    ("num_frames", "max_batch", "expected"), [(9, 6, [3, 3]), (1, 6, [1, 1]), (81, 16, [21, 21]), (9, 3, [5, 6])]
)
def test_the_number_of_batches_is_known_beforehand(num_frames, max_batch, expected):
    """One batch a latent frame, more where a batch takes fewer frames than a latent frame has."""
    it = session(num_frames=num_frames)
    assert [it.num_batches(chunk, max_batch) for chunk in (0, 1)] == expected


def test_a_long_session_remembers_a_bounded_number_of_events():
    """Events that no chunk samples do not gather."""
    it = session()
    for number in range(2000):
        it.receive(keys("w", event_id=number), now=number)
    sampled = it.next_plan()
    assert sampled.plan.event_id == 1999
    assert sampled.event_received_at == 1999
    assert len(it._received_at) <= 512
