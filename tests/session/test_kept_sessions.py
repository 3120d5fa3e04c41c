"""A session that stands still between two chunks: as data and back, and back to an earlier chunk."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session import controls, session_state
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.controls import TOKENS
from lingbot_rt.session.messages import Event, PinnedEvent, Resume
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, ChunkTimings, Rewound
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import rejoined, resolve
from tests.server.conftest import state
from tests.server.fake_engine import CARD
from tests.session.test_session import INIT, decoded, keys

EXTENSIONS = ("control_ack", "pause", "pinned_events", "history")
TIMINGS = ChunkTimings(1, 1, 1, 1)


def new(config: ServeConfig | None = None, **fields) -> Session:
    init = msgspec.structs.replace(INIT, protocol_extensions=EXTENSIONS, interactive_kv_window=True, **fields)
    return Session("s", resolve(init, CARD, config or ServeConfig()))


def again(it: Session) -> Session:
    """Through the text of a file."""
    return Session.restored("s", it.settings, json.loads(json.dumps(it.state())))


def bits(plan: ChunkPlan) -> tuple:
    """Everything of a plan, so that two of them compare bit for bit."""
    arrays = (plan.relative_poses, plan.intrinsics)
    return (
        (plan.chunk_index, plan.prompt, plan.event_id, plan.recent_frames, plan.recache),
        [None if array is None else array.tobytes() for array in arrays],
    )


def path_of(walk: list[tuple[str, ...]], turned: float) -> list:
    """The poses of a walk, off the grid of whole degrees."""
    path = CameraPath()
    angle = np.eye(4)
    angle[:2, :2] = [[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]]
    poses = []
    for held in walk:
        path.extend((held,))
        poses.append((path.pose @ angle).tolist())
    return poses


held = st.lists(st.sampled_from(TOKENS), max_size=3, unique=True).map(tuple)
walks = st.lists(held, min_size=1, max_size=9)
payloads = st.one_of(
    st.tuples(st.just("prompt"), st.sampled_from(["Rain.", "Snow.", {"prompt": "Fog.", "recache": True}])),
    st.tuples(st.just("camera_actions"), walks.map(lambda walk: [list(entry) for entry in walk])),
    st.tuples(
        st.just("camera_actions"),
        walks.map(lambda walk: {"mode": "state", "transitions": [{"actions": list(entry)} for entry in walk]}),
    ),
    st.tuples(
        st.just("camera_poses"),
        st.builds(
            lambda walk, turned, anchor, lens: {"poses": path_of(walk, turned), "anchor": anchor} | lens,
            walks,
            st.floats(-1, 1),
            st.sampled_from(["session", "camera"]),
            st.sampled_from([{}, {"intrinsics": [400.5, 401.0, 30.25, 31.0]}, {"longest_step": 0.3}]),
        ),
    ),
)
steps = st.lists(st.one_of(payloads, st.just("chunk")), max_size=14)


def play(it: Session, steps: list, first_id: int = 0) -> list:
    """Acknowledgements and plans of the steps."""
    seen = []
    for number, step in enumerate(steps):
        if step == "chunk":
            chunk = it.next_chunk(0.0)
            seen.append((bits(chunk.plan), decoded(chunk.acknowledgements)))
        else:
            kind, payload = step
            seen.append(decoded(it.receive(Event(kind=kind, payload=payload, event_id=first_id + number), 0.0)))
    return seen


@given(before=steps, after=steps, latent_frames=st.sampled_from([1, 3]))
@settings(max_examples=120)
def test_a_session_that_was_written_down_goes_on_as_the_one_that_was_not(before, after, latent_frames):
    """Poses, lens, window, prompts, event ids and acknowledgements are the same, bit for bit, whatever waited."""
    it = new(num_frames=4 * latent_frames - 3)
    play(it, before)
    copy = again(it)
    rest = [*after, "chunk", "chunk", "chunk"]
    assert play(copy, rest, 100) == play(it, rest, 100)


def test_a_paused_session_stays_paused():
    """A client that paused and lost its line finds its world as it left it."""
    it = new()
    it.receive(Event(kind="pause"), 3.0)
    assert again(it).is_paused
    assert not Session.restored("s", resolve(INIT, CARD, ServeConfig()), it.state()).is_paused


STATE = new().state()
DAMAGED = [
    (["next_index"], -1),
    (["next_index"], "0"),
    (["queue", "script"], [[None, ["w"]]] * 513),
    (["queue", "script"], [[None, ["jump"]]]),
    (["queue", "script"], [[None, [], 0, 0]]),
    (["queue", "held"], [None, [], 1, 3]),
    (["queue", "prompt"], "x" * 8193),
    (["queue", "waiting"], [[[0, None], True]] * 1025),
    (["camera", "position"], [0, 0]),
    (["camera", "position"], [1e300, 0, 0]),
    (["camera", "path"], 0),
    (["camera", "previous"], [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    (["lens"], [0, 1, 1, 1]),
    (["paths"], [{"poses": [[[0] * 4] * 4]}]),
    (["paths"], [{}]),
    ([], None),
    ([], []),
]


@pytest.mark.parametrize(("place", "value"), DAMAGED)
def test_a_state_that_is_none_is_refused_in_one_line(place, value):
    """A saved world comes from a client: what it says of the controls is checked as every message is."""
    damaged = json.loads(json.dumps(STATE))
    if place:
        inner = damaged
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    else:
        damaged = value
    with pytest.raises(InvalidInit) as refused:
        Session.restored("s", new().settings, damaged)
    assert refused.value.field == "resume"
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


def test_a_state_has_the_limits_of_the_controls():
    """Whatever may wait can be written down and read again."""
    assert session_state.MAX_FRAMES == controls.MAX_PENDING
    assert session_state.MAX_EVENTS == controls.MAX_WAITING
    it = new()
    for number in range(600):
        it.receive(Event(kind="prompt", payload=f"{number}", event_id=number), 0.0)
        it.receive(keys(TOKENS[number % 8], event_id=number), 0.0)
    copy = again(it)
    assert bits(copy.next_chunk(0.0).plan) == bits(it.next_chunk(0.0).plan)


def test_how_a_session_is_sent_may_change_when_it_goes_on():
    """Formats, pacing and extensions are the new client's; ``max_chunks`` counts from where it goes on."""
    it = new(realtime_output_format="raw")
    resume = Resume(resume="x", realtime_output_format="webp", output_compression=70, max_chunks=4)
    changed = rejoined(it.settings, resume, 10)
    assert (changed.output.name, changed.output.quality, changed.max_chunks) == ("webp", 70, 14)
    assert changed.extensions == it.settings.extensions
    assert rejoined(it.settings, Resume(resume="x"), 10) == it.settings
    assert rejoined(it.settings, Resume(resume="x", protocol_extensions=("session",)), 10).extensions == {"session"}


# --- back to an earlier chunk ---


def go_back(it: Session, chunk: int, *, branch: int | None = None, to: int | None = None, event_id: int | None = None):
    """The messages of a rewind, or with ``to`` of a branch with that number."""
    kind = "rewind" if to is None else "branch"
    payload = {"chunk": chunk} | ({} if branch is None else {"branch": branch})
    answers = decoded(it.receive(Event(kind=kind, payload=payload, event_id=event_id), 0.0))
    asked = it.take_asked()
    it.require_kept(asked)
    place = Rewound(chunk, asked.branch if to is None else to, exact=False)
    return answers + decoded(it.gone_back(asked, place))


@given(before=steps, after=steps, back=st.integers(0, 20))
@settings(max_examples=80)
def test_after_going_back_the_camera_goes_on_from_there(before, after, back):
    """Pose, lens, scale and prompt are those of the chunk; keys that are held now stay held, and what waits is gone."""
    it, twin = new(), new()
    played = [*before, "chunk"]
    count = played.count("chunk")
    back %= count
    play(it, played)
    at = [number for number, step in enumerate(played) if step == "chunk"][back]
    play(twin, played[:at])
    go_back(it, back)
    fresh = [("camera_actions", [["w"], ["w", "l"]]), *after, "chunk", "chunk"]  # the script lets go of what is held
    twin._queue.go_back(*twin._queue.prompt_in_force, back)
    twin.receive(keys(), 0.0)  # camera control was asked for before the session went back

    def plans(session: Session) -> list:
        return [entry[0] for entry in play(session, fresh, 100) if isinstance(entry, tuple)]

    assert plans(it) == plans(twin)


def test_held_keys_stay_and_what_waits_is_dropped():
    """Each event has one final answer; a key that is held while one goes back is still held there."""
    it = new()
    it.next_chunk(0.0)
    it.next_chunk(0.0)
    it.receive(Event(kind="prompt", payload="Rain.", event_id=1), 0.0)
    it.receive(Event(kind="camera_actions", payload=[["s"]] * 9, event_id=2), 0.0)
    it.receive(keys("w", event_id=3), 0.0)
    answers = go_back(it, 1, event_id=4)
    acks = [(entry["event_id"], entry["state"]) for entry in answers if entry["type"] == "control_ack"]
    assert acks == [(4, "received"), (1, "dropped"), (2, "dropped"), (4, "applied")]
    assert answers[-1] == {"type": "rewound", "chunk_index": 1, "branch": 0, "exact": False, "event_id": 4}
    chunk = it.next_chunk(0.0)
    assert (chunk.plan.chunk_index, chunk.plan.prompt, chunk.plan.event_id) == (1, "A street.", 3)
    assert np.abs(chunk.plan.relative_poses[1:, 2, 3]).min() > 0
    assert [(a["event_id"], a["state"]) for a in decoded(chunk.acknowledgements)] == [(3, "applied")]


def test_pinned_events_apply_again():
    """They belong to their chunk, however often it comes."""
    it = new(pinned_events=(PinnedEvent(chunk=2, kind="prompt", payload="Rain.", event_id=7),))
    prompts = [it.next_chunk(0.0).plan.prompt for _ in range(4)]
    go_back(it, 1)
    assert [it.next_chunk(0.0).plan.prompt for _ in range(3)] == prompts[1:]
    assert prompts == ["A street.", "A street.", "Rain.", "Rain."]


def test_branches_keep_what_came_after():
    """A branch leaves the old line where it is; a rewind forgets what came after; both can be gone back to."""
    it = new()
    it.receive(keys("w"), 0.0)
    first = [bits(it.next_chunk(0.0).plan) for _ in range(6)]
    go_back(it, 2, to=1)
    it.receive(keys("s"), 0.0)
    assert bits(it.next_chunk(0.0).plan) != first[2]
    assert it.branch == 1
    go_back(it, 6, branch=0)
    assert (it.branch, it.next_index) == (0, 6)
    go_back(it, 3, branch=0)
    with pytest.raises(InvalidEvent, match="6 is not kept, expected a chunk of branch 0 that is: 0 to 3"):
        go_back(it, 6, branch=0)
    go_back(it, 3, branch=1)
    assert (it.branch, it.next_index) == (1, 3)


def test_what_cannot_be_gone_back_to_says_what_can():
    """Chunks that are not made yet, that were forgotten, branches that never were, and payloads that are none."""
    it = new()
    first, *_ = [it.next_chunk(0.0) for _ in range(4)]
    stats = msgspec.msgpack.decode(it.stats(first, ChunkResult(0, 12, 9, TIMINGS, kept_from=2)))
    assert (stats["kept_from"], stats["branch"]) == (2, 0)
    for payload, field, text in [
        ({"chunk": 1}, "chunk", "1 is not kept, expected a chunk of branch 0 that is: 2 to 3"),
        ({"chunk": 9}, "chunk", "9 is not kept"),
        ({"chunk": 2, "branch": 5}, "branch", "5 is not kept, expected one of the branches that are: 0"),
        ({"chunk": -1}, "rewind.chunk", "-1, expected"),
        ({"chunk": True}, "rewind.chunk", "True, expected"),
        ({"branch": 0}, "rewind.chunk", "None, expected"),
        (3, "rewind", "3 is not a map"),
    ]:
        with pytest.raises(InvalidEvent, match=text) as refused:
            it.receive(Event(kind="rewind", payload=payload, event_id=4), 0.0)
        assert (refused.value.field, refused.value.event_id) == (field, 4)
    assert it.take_asked() is None


def test_what_another_branch_has_is_not_guessed():
    """The engine says it: when it refuses, and when it goes there, as some of the branch may have been let go."""
    it = new()
    for _ in range(6):
        it.next_chunk(0.0)
    go_back(it, 2, to=1)
    with pytest.raises(InvalidEvent, match=r"9 is not kept, expected a chunk of branch 0 that is$"):
        it.receive(Event(kind="rewind", payload={"chunk": 9, "branch": 0}), 0.0)
    it.receive(Event(kind="rewind", payload={"chunk": 6, "branch": 0}), 0.0)
    it.gone_back(it.take_asked(), Rewound(6, 0, exact=False, kept_from=4))
    with pytest.raises(InvalidEvent, match="3 is not kept, expected a chunk of branch 0 that is: 4 to 6"):
        it.receive(Event(kind="rewind", payload={"chunk": 3}), 0.0)


def test_a_client_that_comes_back_without_history_does_not_go_back():
    """What the one before asked for is refused before the engine goes back."""
    it = new()
    it.next_chunk(0.0)
    it.receive(Event(kind="rewind", payload={"chunk": 1}), 0.0)
    it.rejoin(rejoined(it.settings, Resume(resume="t", protocol_extensions=("session",)), 1), Rewound(1, 0, True), 0.0)
    with pytest.raises(InvalidEvent, match='needs "history" in protocol_extensions'):
        it.require_kept(it.take_asked())


def test_without_history_the_event_names_the_flag():
    """--history-mb 0 keeps nothing; without the extension there is no such event."""
    with pytest.raises(InvalidEvent, match="--history-mb 0"):
        new(ServeConfig(history_mb=0)).receive(Event(kind="rewind", payload={"chunk": 0}), 0.0)
    with pytest.raises(InvalidEvent, match="unsupported event kind"):
        Session("s", resolve(INIT, CARD, ServeConfig())).receive(Event(kind="save"), 0.0)


def test_chunks_in_work_are_not_sent_after_going_back():
    """They belong to a line that was left, also when not one chunk was sent before."""
    it = new()
    left = it.next_chunk(0.0)
    go_back(it, 0)
    chunk = it.next_chunk(5.0)
    assert not it.is_current(left)
    assert it.is_current(chunk)
    chunk.sent_at = 5.5
    stats = msgspec.msgpack.decode(it.stats(chunk, ChunkResult(0, 9, 9, TIMINGS)))
    assert stats["chunk_total_ms"] == 500


def test_of_what_was_asked_the_newest_is_done():
    """A slider sends many rewinds before one chunk is over: each older one is answered, and only the last is done."""
    it = new()
    for _ in range(4):
        it.next_chunk(0.0)
    acks = []
    for number in range(4):
        event = Event(kind="rewind", payload={"chunk": number}, event_id=number)
        acks += [(a["event_id"], a["state"]) for a in decoded(it.receive(event, 0.0))]
    it.receive(Event(kind="save", event_id=9), 0.0)
    assert [ack for ack in acks if ack[1] == "dropped"] == [(0, "dropped"), (1, "dropped"), (2, "dropped")]
    first, second = it.take_asked(), it.take_asked()
    assert (first.kind, first.chunk, second.kind) == ("rewind", 3, "save")
    assert decoded(it.saved(second, b"file"))[-1] == {
        "type": "world",
        "chunk_index": 4,
        "event_id": 9,
        "payload": b"file",
    }


def test_state_of_a_walk_is_small():
    """A minute of walking is a few kilobytes in a file."""
    it = new()
    it.receive(Event(kind="camera_actions", payload=state("w", "l")), 0.0)
    for _ in range(100):
        it.next_chunk(0.0)
    assert len(json.dumps(it.state())) < 4000
