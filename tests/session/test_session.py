"""The session without sockets or engine: what a chunk is planned with."""

from __future__ import annotations

import sys

import msgspec
import numpy as np
import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit, PauseExpired
from lingbot_rt.session.controls import MAX_WAITING, parse_event
from lingbot_rt.session.messages import Event, Init
from lingbot_rt.session.plan import ChunkResult, ChunkTimings
from lingbot_rt.session.server_messages import EncodedBatch
from lingbot_rt.session.session import HEARTBEAT_S, SendTimes, Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.shapes import FrameSize
from tests.server.conftest import state
from tests.server.fake_engine import CARD

INIT = Init(prompt="A street.", first_frame=b"x", size="64x64")
BATCH = EncodedBatch("application/x-raw-rgb", "raw", 4, b"pixels", None, 64, 64, 64, 64, 6)


def session(config: ServeConfig | None = None, keep_events: bool = False, **fields) -> Session:
    init = msgspec.structs.replace(INIT, **fields)
    return Session("s", resolve(init, CARD, config or ServeConfig()), keep_events=keep_events)


def decoded(messages) -> list[dict]:
    return [msgspec.msgpack.decode(message) for message in messages]


def send_chunk(it: Session, planned_at: float, sent_at: float) -> dict:
    """Plans a chunk, sends its frames in one batch per latent frame, and returns its chunk_stats message."""
    chunk = it.next_chunk(planned_at)
    for _ in range(chunk.num_batches):
        it.frame_batch(chunk, BATCH)
        it.sent(chunk, SendTimes(2.0, 3.0, sent_at), pace_wait_ms=1.0)
    timings = ChunkTimings(prepare_ms=1, dit_ms=20, vae_ms=10, total_ms=31, stages={"denoise": 20})
    return msgspec.msgpack.decode(it.stats(chunk, ChunkResult(chunk.plan.chunk_index, 12, 9, timings)))


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


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"size": "4160x64", "enable_upscaling": True}, "16383"),
        ({"size": "16400x64"}, "16383"),
        ({"size": "65520x64", "realtime_output_format": "jpeg"}, "65500"),
        ({"size": "4160x64", "enable_upscaling": True, "upscaling_scale": 3}, None),
        ({"size": "4160x64", "enable_upscaling": True, "realtime_preview_max_width": 8192}, None),
        ({"size": "4160x64", "enable_upscaling": True, "realtime_output_format": "raw"}, None),
    ],
)
def test_pictures_larger_than_their_format_are_refused(fields, limit):
    """The session would break with its first frame. The limit is that of the format and of the picture that is sent."""
    init = msgspec.structs.replace(INIT, **{"realtime_output_format": "webp"} | fields)
    config = ServeConfig(max_pixels=4096 * 4096)
    if limit is None:
        assert resolve(init, CARD, config).size == FrameSize(4160, 64)
        return
    with pytest.raises(InvalidInit, match=limit) as refused:
        resolve(init, CARD, config)
    assert refused.value.field == "size"


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


STILL, MOVING = keys(), keys("w")


@pytest.mark.parametrize(
    ("server", "asked", "expected"),
    [
        (False, None, [None] * 8),
        (False, True, [None, 12, 12, 12, 3, 3, 12, 12]),
        (True, None, [None, 12, 12, 12, 3, 3, 12, 12]),
        (True, False, [None] * 8),
    ],
)
def test_the_interactive_window_follows_the_camera(server, asked, expected):
    """12 latent frames while the camera moves and in the first still chunk after, then 3; without camera control the
    whole window. The init has the last word."""
    config = ServeConfig(interactive_kv_window=server)
    it = session(config, interactive_kv_window=asked, realtime_causal_kv_cache_num_frames=45)
    found = []
    for event in (None, MOVING, MOVING, STILL, STILL, STILL, keys("i"), STILL):
        if event is not None:
            it.receive(event, 0.0)
        found.append(it.next_chunk(0.0).plan.recent_frames)
    assert found == expected
    plan = it.settings.session_plan("s", np.zeros((64, 64, 3), np.uint8))
    assert (plan.window_frames, plan.recent_frames) == (45, (3, 12) if any(expected) else ())


def test_keys_that_cancel_stand_still():
    """What counts is that the camera moves: not that keys are held, nor what is left of rounding."""
    it = session(interactive_kv_window=True, realtime_causal_kv_cache_num_frames=45)
    it.receive(keys("w", "l", "i"), 0.0)
    assert it.next_chunk(0.0).plan.recent_frames == 12
    it.receive(keys("w", "s"), 0.0)
    assert [it.next_chunk(0.0).plan.recent_frames for _ in range(3)] == [12, 3, 3]


def test_the_interactive_window_is_never_larger_than_the_window():
    """What does not fit beside sink and chunk is not seen."""
    for window, expected in ((18, (3, 6)), (14, (2, 2)), (12, (0, 0))):
        settings = session(
            interactive_kv_window=True, realtime_causal_sink_size=9, realtime_causal_kv_cache_num_frames=window
        ).settings
        assert (settings.window_frames, settings.recent_frames) == (window, expected)


@pytest.mark.parametrize(("quality", "expected"), [(None, False), ("high", True), ("low", False), ("", False)])
def test_high_quality_is_a_vae_in_bfloat16(quality, expected):
    """As in the reference. Any other word changes nothing."""
    settings = session(quality=quality).settings
    assert settings.session_plan("s", np.zeros((64, 64, 3), np.uint8)).bfloat16_vae == expected


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


# --- what a chunk samples ---


def test_events_wait_for_the_next_plan_and_no_longer():
    """Events are sampled when a chunk is planned: one that comes a moment later is in the next chunk."""
    it = session()
    first = it.next_chunk(9.0)
    assert (first.plan.relative_poses, first.plan.event_id, first.newest_event) == (None, None, None)
    it.receive(keys("w", event_id=3), now=10.0)
    second = it.next_chunk(11.0)
    assert (second.plan.event_id, second.newest_event.at) == (3, 10.0)
    assert np.linalg.norm(second.plan.relative_poses[1:, :3, 3], axis=-1) == pytest.approx(1)
    third = it.next_chunk(12.0)
    assert (third.plan.event_id, third.newest_event) == (3, None)
    assert [chunk.plan.chunk_index for chunk in (first, second, third)] == [0, 1, 2]


def test_a_prompt_event_is_in_force_from_the_next_chunk():
    """The prompt changes with the chunk that samples it and stays."""
    it = session()
    it.next_chunk(0)
    it.receive(Event(kind="prompt", payload="A river."), now=0)
    assert [it.next_chunk(0).plan.prompt for _ in range(2)] == ["A river.", "A river."]


@pytest.mark.parametrize("init", [False, True])
def test_recache_is_asked_for_by_the_init_or_by_the_event(init):
    """The event has the last word. Without one the init decides, and a prompt that stays the same asks for nothing."""
    for payload, expected in (
        ("B", init),
        ({"prompt": "B"}, init),
        ({"prompt": "B", "recache": True}, True),
        ({"prompt": "B", "recache": False}, False),
        (INIT.prompt, False),
        ({"prompt": INIT.prompt, "recache": True}, True),
    ):
        it = session(recache=init, keep_events=True)
        it.next_chunk(0.0)
        it.receive(Event(kind="composite_input", payload={"input_types": ["prompt"], "prompt": payload}), 0.0)
        chunk = it.next_chunk(0.0)
        assert chunk.plan.recache == expected
        assert not it.next_chunk(0.0).plan.recache
        ((kind, kept, _),) = chunk.events
        assert kind == "prompt"
        assert parse_event(kind, kept) == parse_event("prompt", payload)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"prompt": "B", "recache": 1}, "prompt.recache"),
        ({"recache": True}, "prompt"),
        ({"prompt": {"prompt": "B"}}, "prompt"),
    ],
)
def test_a_wrong_recache_is_refused(payload, field):
    """By the place of what is wrong; the prompt stays."""
    it = session()
    it.next_chunk(0.0)
    with pytest.raises(InvalidEvent) as refused:
        it.receive(Event(kind="prompt", payload=payload), 0.0)
    assert refused.value.field == field
    assert it.next_chunk(0.0).plan.prompt == INIT.prompt


def test_a_script_in_the_init_runs_from_the_first_chunk():
    """F entries per chunk, then neutral: the camera stands still, but camera control stays on."""
    it = session(condition_inputs={"camera_actions": [["w"]] * 4})
    moved = [np.linalg.norm(it.next_chunk(0).plan.relative_poses[:, :3, 3], axis=-1) > 0 for _ in range(3)]
    assert [list(chunk) for chunk in moved] == [[False, True, True], [True, False, False], [False] * 3]


@pytest.mark.parametrize("frames", [512, 513])
def test_a_script_has_a_limit_that_is_told(frames):
    """512 latent frames are played to the last one; 513 are refused with the number, in an event as in an init."""
    script = [["w"]] * frames
    if frames == 512:
        it = session(condition_inputs={"camera_actions": script}, num_frames=81)
        moved = [np.linalg.norm(it.next_chunk(0).plan.relative_poses[:, :3, 3], axis=-1) > 0 for _ in range(25)]
        assert np.concatenate(moved).sum() == 511  # the very first pose has none before it
        return
    with pytest.raises(InvalidInit, match="513 latent frames are too many, at most 512"):
        session(condition_inputs={"camera_actions": script})
    with pytest.raises(InvalidEvent, match="513 latent frames are too many, at most 512"):
        session().receive(Event(kind="camera_actions", payload=script), now=0)


def test_a_composite_event_is_all_or_nothing():
    """When one half is wrong, neither half is applied."""
    it = session()
    it.next_chunk(0)
    payload = {"input_types": ["prompt", "camera_actions"], "prompt": "A river.", "camera_actions": [["x"]]}
    with pytest.raises(InvalidEvent):
        it.receive(Event(kind="composite_input", payload=payload, event_id=1), now=0)
    plan = it.next_chunk(0).plan
    assert (plan.prompt, plan.relative_poses, plan.event_id) == ("A street.", None, None)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # A prompt is named although a key is held since before, and the key again once it changes.
        ([(1, "w"), 0, (2, "A river."), 0, 0, (3, ""), 0], [1, 2, 2, 3]),
        # The order of arrival decides, not the number: ids count a page, not a session.
        ([(9, "A river."), 0, 0, (4, "w"), 0], [None, 9, 4]),
        # A key that arrives after a prompt and is sampled before it stays the newest.
        ([(5, "A river."), (6, "w"), 0, 0], [6, 6]),
        # Events without an id hide no id.
        ([(1, "A river."), 0, 0, (None, "w"), 0], [None, 1, 1]),
        # A script is in force until it is used up.
        ([0, (1, "A river."), 0, (2, [["w"]] * 4), 0, 0, 0], [None, 1, 2, 2, 1]),
    ],
)
def test_the_echoed_id_is_that_of_the_newest_event_in_force(steps, expected):
    """Whatever its kind; a step is (id, keys, prompt or script) for an event and 0 for a chunk."""
    it, got = session(), []
    for step in steps:
        if step == 0:
            got.append(it.next_chunk(0).plan.event_id)
            continue
        event_id, what = step
        if isinstance(what, list):
            it.receive(Event(kind="camera_actions", payload=what, event_id=event_id), now=0)
        elif len(what) <= 1:
            it.receive(keys(*what, event_id=event_id), now=0)
        else:
            it.receive(Event(kind="prompt", payload=what, event_id=event_id), now=0)
    assert got == expected


@pytest.mark.parametrize("held", [("w",), ("w", "d"), ()])
def test_a_tap_beside_held_keys_moves_one_latent_frame(held):
    """A key tapped between two chunks turns the camera once, whatever else is held before and after."""
    plain, tapped = session(), session()
    for it in (plain, tapped):
        it.receive(keys(*held), now=0)
        it.next_chunk(0)
    tapped.receive(keys(*held, "l"), now=1)
    tapped.receive(keys(*held), now=2)
    straight, turned = plain.next_chunk(3).plan.relative_poses, tapped.next_chunk(3).plan.relative_poses
    yaw = np.degrees(np.arctan2(turned[:, 0, 2], turned[:, 2, 2]))
    assert yaw == pytest.approx([6, 0, 0])
    assert np.allclose(turned[1:], straight[1:])
    assert np.allclose(tapped.next_chunk(4).plan.relative_poses, plain.next_chunk(4).plan.relative_poses)


def test_every_sampled_event_is_acknowledged_once():
    """Received at once, applied with the chunk that samples it: replaced events too, a prompt not before chunk 1."""
    it = session(protocol_extensions=("control_ack",))
    received = []
    for event in (
        Event(kind="prompt", payload="A river.", event_id=1),
        Event(kind="camera_actions", payload=[["w"]], event_id=2),
        keys("w", event_id=3),
        keys("d", event_id=4),
        Event(kind="prompt", payload="A lake.", event_id=5),
    ):
        received += decoded(it.receive(event, now=0))
    assert [(ack["state"], ack["event_id"]) for ack in received] == [("received", number) for number in range(1, 6)]
    chunks = [it.next_chunk(1) for _ in range(3)]
    applied = [[ack["event_id"] for ack in decoded(chunk.acknowledgements)] for chunk in chunks]
    assert applied == [[2, 3, 4], [1, 5], []]
    assert [ack["chunk_index"] for ack in decoded(chunks[1].acknowledgements)] == [1, 1]
    assert {ack["state"] for ack in decoded(chunks[0].acknowledgements)} == {"applied"}


def test_in_a_chunk_of_one_latent_frame_a_release_is_applied_after_its_tap():
    """A press and a release between two chunks of one latent frame take effect one after the other."""
    it = session(protocol_extensions=("control_ack",), num_frames=1)
    it.receive(keys("w", event_id=1), now=0)
    it.receive(keys(event_id=2), now=0)
    chunks = [it.next_chunk(1) for _ in range(2)]
    assert [[ack["event_id"] for ack in decoded(chunk.acknowledgements)] for chunk in chunks] == [[1], [2]]
    assert [chunk.plan.event_id for chunk in chunks] == [1, 2]


def test_a_composite_is_applied_with_its_prompt_when_a_tap_holds_its_keys_back():
    """In chunks of one latent frame its prompt is in force first, and so is its id: it is answered with that chunk."""
    it = session(num_frames=1, protocol_extensions=("control_ack",))
    it.next_chunk(0.0)
    it.receive(keys("w", event_id=1), 1.0)
    both = {"input_types": ["prompt", "camera_actions"], "prompt": "Rain.", "camera_actions": state()}
    it.receive(Event(kind="composite_input", payload=both, event_id=2), 1.0)
    chunk = it.next_chunk(2.0)
    assert (chunk.plan.prompt, chunk.plan.event_id) == ("Rain.", 2)
    assert [(ack["event_id"], ack["state"]) for ack in decoded(chunk.acknowledgements)] == [
        (1, "applied"),
        (2, "applied"),
    ]
    assert it.next_chunk(3.0).acknowledgements == ()


def test_events_without_end_are_all_applied_or_replaced():
    """5,000 key events over 500 chunks: every one is acknowledged as applied, in order."""
    it, applied = session(protocol_extensions=("control_ack",)), []
    for number in range(5_000):
        it.receive(keys(*"w" * (number % 2), event_id=number), now=0)
        if number % 10 == 9:
            applied += [ack["event_id"] for ack in decoded(it.next_chunk(0).acknowledgements)]
    assert applied == list(range(5_000))


@pytest.mark.parametrize("kind", ["prompt", "keys", "script", "nothing", "mixed"])
def test_after_a_burst_no_id_is_without_a_final_answer(kind):
    """20,000 events between two chunks: each is received, then applied by the next chunk or dropped, once.

    What the chunk runs with is among the applied ones, and few wait at any time.
    """
    it, answers = session(protocol_extensions=("control_ack",)), []
    it.next_chunk(0)
    events = {
        "prompt": lambda number: Event(kind="prompt", payload=f"Rain {number}.", event_id=number),
        "keys": lambda number: keys("w", event_id=number),
        "script": lambda number: Event(kind="camera_actions", payload=[["w"]], event_id=number),
        "nothing": lambda number: Event(
            kind="camera_actions", payload={"mode": "state", "transitions": []}, event_id=number
        ),
    }
    for number in range(20_000):
        name = list(events)[number % 7 % 4] if kind == "mixed" else kind
        answers += decoded(it.receive(events[name](number), now=0))
        assert len(it._queue._waiting) <= MAX_WAITING
    chunk = it.next_chunk(0)
    answers += decoded(chunk.acknowledgements)
    by_state = {
        state: [ack["event_id"] for ack in answers if ack["state"] == state] for state in ("received", "applied")
    }
    dropped = [ack["event_id"] for ack in answers if ack["state"] == "dropped"]
    assert by_state["received"] == list(range(20_000))
    assert sorted(by_state["applied"] + dropped) == list(range(20_000))
    assert by_state["applied"] == sorted(by_state["applied"])
    assert chunk.plan.event_id in (by_state["applied"][-1], None if kind == "nothing" else by_state["applied"][-1])
    assert {ack["chunk_index"] for ack in answers if ack["state"] == "applied"} == {1}


def test_an_event_that_still_counts_is_never_dropped():
    """A tap, a prompt and held keys that wait behind thousands of newer events of another kind are applied."""
    it, answers = session(protocol_extensions=("control_ack",)), []
    it.receive(keys("w", event_id=0), now=0)
    it.next_chunk(0)
    it.receive(keys("l", event_id=1), now=0)
    it.receive(keys("w", event_id=2), now=0)
    for number in range(3, 5_000):
        answers += decoded(it.receive(Event(kind="prompt", payload="Rain.", event_id=number), now=0))
    it.receive(Event(kind="prompt", payload="Snow.", event_id=5_000), now=0)
    chunk = it.next_chunk(0)
    applied = [ack["event_id"] for ack in decoded(chunk.acknowledgements)]
    assert (applied[:2], applied[-1], chunk.plan.prompt) == ([1, 2], 5_000, "Snow.")
    yaw = np.degrees(np.arctan2(chunk.plan.relative_poses[:, 0, 2], chunk.plan.relative_poses[:, 2, 2]))
    assert yaw == pytest.approx([6, 0, 0])


def test_events_that_come_too_late_are_dropped_in_words():
    """With ``max_chunks`` the last chunk answers for what it leaves, and later events are answered at once."""
    it = session(protocol_extensions=("control_ack", "pause"), max_chunks=1)
    it.receive(Event(kind="prompt", payload="Rain.", event_id=1), now=0)
    it.receive(keys("w", event_id=2), now=0)
    last = decoded(it.next_chunk(0).acknowledgements)
    assert [(ack["state"], ack["event_id"]) for ack in last] == [("applied", 2), ("dropped", 1)]
    assert "chunk_index" not in last[1]
    for event in (keys("w", event_id=3), Event(kind="pause", event_id=3)):
        answers = decoded(it.receive(event, now=0))
        assert [(ack["state"], ack["event_id"]) for ack in answers] == [("received", 3), ("dropped", 3)]


def test_pause_and_resume_are_applied_at_once():
    """Each names the chunk that it holds back or lets go."""
    it = session(protocol_extensions=("control_ack", "pause"))
    it.next_chunk(0)
    for number, kind in enumerate(("pause", "resume")):
        answers = decoded(it.receive(Event(kind=kind, event_id=number), now=0))
        assert [(ack["state"], ack.get("chunk_index")) for ack in answers] == [("received", None), ("applied", 1)]


def test_a_long_session_remembers_a_bounded_number_of_events():
    """Events that no chunk samples do not gather, and the newest one is the one that counts."""
    it = session(keep_events=True)
    for number in range(5_000):
        it.receive(keys("w", event_id=number), now=number)
    chunk = it.next_chunk(5_000)
    assert (chunk.plan.event_id, chunk.newest_event.at) == (4_999, 4_999)
    assert len(chunk.events) <= 4096


def test_what_nobody_reads_of_an_event_is_not_kept():
    """A payload's unread parts go at once; what was parsed is kept for a record, and only for one."""
    unread = bytearray(1000)
    payload = {"input_types": ["prompt"], "prompt": "A river.", "unread": unread}
    references = sys.getrefcount(unread)
    plain, recorded = session(), session(keep_events=True)
    for it in (plain, recorded):
        it.receive(Event(kind="composite_input", payload=dict(payload), event_id=1), now=0)
        it.receive(Event(kind="camera_actions", payload=state("w"), event_id=2), now=0)
    assert sys.getrefcount(unread) == references
    assert plain.next_chunk(0).events == ()
    assert recorded.next_chunk(0).events == (("prompt", "A river.", 1), ("camera_actions", state("w"), 2))


# --- pauses and time ---


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


def test_a_pause_ends_with_an_error_after_its_limit():
    """--pause-limit-s counts from the first of several pauses in a row; a resume in time starts it anew."""
    it = session(ServeConfig(pause_limit_s=300), protocol_extensions=("pause",))
    it.receive(Event(kind="pause"), now=0)
    it.receive(Event(kind="pause"), now=299)
    assert it.tick(300) == ()
    it.receive(Event(kind="resume"), now=300)
    assert it.tick(1000) == ()
    it.receive(Event(kind="pause"), now=1000)
    with pytest.raises(PauseExpired, match="paused for longer than 300 s \\(--pause-limit-s\\)"):
        it.tick(1300.5)


def test_heartbeats_come_at_their_interval():
    """Only for those who asked, every five seconds, with the state and the next chunk."""
    assert session().tick(1000) == ()
    it = session(protocol_extensions=("heartbeat", "pause"))
    beats = [decoded(it.tick(now)) for now in (0, HEARTBEAT_S - 0.1, HEARTBEAT_S, HEARTBEAT_S + 1)]
    assert [len(beat) for beat in beats] == [0, 0, 1, 0]
    assert beats[2] == [{"type": "heartbeat", "uptime_ms": 5000, "state": "running", "chunk_index": 0}]
    it.receive(Event(kind="pause"), now=6)
    assert decoded(it.tick(10))[0]["state"] == "paused"


# --- statistics ---


def test_chunk_times_follow_one_another():
    """Chunks overlap, their times do not: each counts from the end of the one before, whenever it was planned.

    The first one, of a session or after a pause, counts from its own beginning.
    """
    it = session(protocol_extensions=("pause",))
    assert send_chunk(it, planned_at=10.0, sent_at=10.4)["chunk_total_ms"] == 400
    assert send_chunk(it, planned_at=10.3, sent_at=10.9)["chunk_total_ms"] == 500
    it.receive(Event(kind="pause"), now=10.9)
    it.receive(Event(kind="resume"), now=20.0)
    assert send_chunk(it, planned_at=20.0, sent_at=20.3)["chunk_total_ms"] == 300
    assert send_chunk(it, planned_at=20.2, sent_at=20.7)["chunk_total_ms"] == 400
    assert send_chunk(it, planned_at=21.0, sent_at=21.2)["chunk_total_ms"] == 500


def test_the_statistics_of_a_chunk():
    """Sizes and waits add up over the batches; the event's latency ends with the first batch."""
    it = session(profile=True, realtime_output_format="raw")
    it.receive(keys("w", event_id=7), now=9.0)
    chunk = it.next_chunk(10.0)
    assert (chunk.num_frames, chunk.num_batches) == (9, 3)
    for number in range(3):
        (message,) = it.frame_batch(chunk, BATCH)
        header = msgspec.msgpack.decode(message)
        assert (header["frame_batch_index"], header["is_final_frame_batch"]) == (number, number == 2)
        it.sent(chunk, SendTimes(2.0, 3.0, 10.5 + number), pace_wait_ms=1.0)
    timings = ChunkTimings(prepare_ms=1, dit_ms=20, vae_ms=10, total_ms=31, stages={"denoise": 20})
    stats = msgspec.msgpack.decode(it.stats(chunk, ChunkResult(0, 9, 3, timings)))
    assert (stats["event_id"], stats["event_latency_ms"]) == (7, 1500)
    assert (stats["num_batches"], stats["num_frames"], stats["raw_bytes"]) == (3, 12, 18)
    assert (stats["pace_wait_ms"], stats["header_write_ms"], stats["raw_write_ms"]) == (3, 6, 9)
    assert (stats["dit_ms"], stats["vae_ms"], stats["scheduler_forward_ms"], stats["window_frames"]) == (20, 10, 31, 3)
    assert stats["stages"] == {"prepare": 1, "denoise": 20}


def test_the_latency_counts_from_the_newest_event_of_the_chunk():
    """Of several events that one chunk samples, whatever their kinds and ids."""
    it = session()
    send_chunk(it, 0.0, 0.1)
    it.receive(keys("w", event_id=1), now=1.0)
    it.receive(Event(kind="prompt", payload="A river."), now=2.0)
    assert send_chunk(it, 3.0, 4.0)["event_latency_ms"] == 2000
    assert send_chunk(it, 5.0, 6.0)["event_latency_ms"] is None


def test_max_chunks_counts_plans():
    """The session is complete when as many chunks as asked for have been planned."""
    it = session(max_chunks=2)
    assert not it.is_complete
    it.next_chunk(0)
    it.next_chunk(0)
    assert it.is_complete


@pytest.mark.parametrize(("num_frames", "expected"), [(9, [3, 3]), (1, [1, 1]), (81, [21, 21])])
def test_the_number_of_batches_is_known_beforehand(num_frames, expected):
    """One batch per latent frame; with interpolation more, where a latent frame has more than six pictures."""
    it = session(num_frames=num_frames, realtime_output_format="webp")
    assert [it.next_chunk(0).num_batches for _ in range(2)] == expected
    fast = session(enable_frame_interpolation=True, frame_interpolation_exp=2, realtime_output_format="webp")
    chunks = [fast.next_chunk(0) for _ in range(2)]
    assert [(chunk.num_frames, chunk.num_batches) for chunk in chunks] == [(33, 7), (48, 9)]
