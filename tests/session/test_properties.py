"""What holds for any input: parsing never breaks, queues stay bounded, a long walk stays exact and small."""

from __future__ import annotations

import pickle
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.camera_path import PITCH_LIMIT_DEGREES, CameraPath, invert
from lingbot_rt.session.controls import (
    MAX_PENDING,
    TOKENS,
    ConditionQueue,
    PromptEvent,
    ScriptEvent,
    StateEvent,
    Transition,
    parse_event,
)
from lingbot_rt.shapes import FrameSize, intrinsics

STATE = {"mode": "state"}
keys = st.lists(st.sampled_from(TOKENS), max_size=4).map(tuple)
actions = st.lists(keys, max_size=8).map(tuple)
events = st.one_of(
    st.text(min_size=1, max_size=5).map(PromptEvent),
    actions.map(ScriptEvent),
    st.lists(keys.map(Transition), max_size=6).map(lambda entries: StateEvent(tuple(entries))),
)
wire = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "mode",
                    "transitions",
                    "actions",
                    "input_types",
                    "prompt",
                    "poses",
                    "intrinsics",
                    "recache",
                    "size",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


kinds = st.sampled_from(["prompt", "camera_actions", "camera_poses", "composite_input", "jump", ""])


@given(kind=kinds, payload=wire)
@settings(max_examples=150)
def test_any_payload_is_taken_or_refused_by_name(kind, payload):
    """Whatever a client packs, the parser answers with events or with InvalidEvent, nothing else."""
    refused = None
    try:
        assert isinstance(parse_event(kind, payload), tuple)
    except InvalidEvent as error:
        refused = error
    assert refused is None or (refused.field and "\n" not in str(refused))


@given(
    st.lists(
        st.tuples(st.one_of(events.map(lambda e: ("event", e)), st.integers(1, 8).map(lambda n: ("sample", n)))),
        max_size=15,
    )
)
@settings(max_examples=60)
def test_samples_have_the_length_asked_for(steps):
    """Once control was asked for, every sample has one entry per latent frame; nothing waits without bound."""
    queue, controlled = ConditionQueue("p"), False
    for ((kind, value),) in steps:
        if kind == "event":
            queue.apply([value], 1)
            controlled = (
                controlled
                or isinstance(value, ScriptEvent)
                or (isinstance(value, StateEvent) and bool(value.transitions))
            )
            assert queue.pending <= MAX_PENDING
        else:
            sampled = queue.sample(value)
            assert (sampled.camera_actions is not None) == controlled
            assert sampled.camera_actions is None or len(sampled.camera_actions) == value


@given(st.lists(keys, min_size=1, max_size=10))
@settings(max_examples=50)
def test_what_is_held_last_stays_held(transitions):
    """After any burst of transitions the second chunk holds exactly the newest keys."""
    queue = ConditionQueue("p")
    queue.apply([StateEvent(tuple(Transition(held) for held in transitions))], 5)
    first, second = queue.sample(3), queue.sample(3)
    assert second.camera_actions == (transitions[-1],) * 3
    assert first.camera_actions[1:] == (transitions[-1],) * 2
    assert first.event_id == second.event_id == 5


def test_an_unknown_key_lists_the_valid_ones():
    """A wrong token names itself, where it stands and what is valid."""
    with pytest.raises(InvalidEvent, match=r"'x'.*w, a, s, d, i, j, k, l") as error:
        parse_event("camera_actions", [["w"], ["x"]])
    assert error.value.field == "camera_actions[1]"


def test_a_prompt_has_a_limit():
    """8,192 characters pass, one more does not."""
    assert parse_event("prompt", "x" * 8192)
    with pytest.raises(InvalidEvent, match="8193 characters"):
        parse_event("prompt", "x" * 8193)


@pytest.mark.parametrize(
    ("kind", "payload", "field", "text"),
    [
        ("jump", "x", "kind", "'jump'.*camera_actions, prompt, composite_input"),
        ("prompt", "  ", "prompt", "'  ' is not a non-empty string"),
        ("prompt", 7, "prompt", "7 is not a non-empty string"),
        ("camera_actions", "w", "camera_actions", r"'w' is not list\[list\[str\]\]"),
        ("camera_actions", ["w"], "camera_actions", r"\['w'\] is not list\[list\[str\]\]"),
        ("camera_actions", {"mode": "hold"}, "camera_actions", "'hold'.*\"state\""),
        ("camera_actions", {"mode": "state"}, "camera_actions.transitions", "None is not a list"),
        ("camera_actions", STATE | {"transitions": [["w"]]}, "camera_actions.transitions[0]", "actions and client_ts"),
        (
            "camera_actions",
            STATE | {"transitions": [{"actions": []}, {"actions": "w"}]},
            "camera_actions.transitions[1].actions",
            "'w' is not a list of keys",
        ),
        (
            "camera_actions",
            STATE | {"transitions": [{"actions": [], "client_ts_ms": "noon"}]},
            "camera_actions.transitions[0].client_ts_ms",
            "'noon' is not a time",
        ),
        ("composite_input", [], "composite_input", r"\[\] is not a map"),
        ("composite_input", {"input_types": []}, "composite_input.input_types", "not a non-empty list"),
        ("composite_input", {"input_types": ["jump"]}, "composite_input.input_types", "'jump'.*camera_actions, prompt"),
        ("composite_input", {"input_types": ["prompt"]}, "composite_input.prompt", "missing"),
        ("composite_input", {"input_types": ["prompt"], "prompt": ""}, "prompt", "'' is not a non-empty string"),
    ],
)
def test_a_refusal_names_field_value_and_what_is_expected(kind, payload, field, text):
    """Every way a payload can be wrong says where, what was there and what belongs there."""
    with pytest.raises(InvalidEvent, match=text) as error:
        parse_event(kind, payload)
    assert error.value.field == field


@pytest.mark.parametrize("time", [None, 12, 12.0, "12", "12.5", 1.7e12])
def test_times_come_in_every_form(time):
    """A transition's time may be absent, a number or a number as a string."""
    (event,) = parse_event("camera_actions", STATE | {"transitions": [{"actions": ["w"], "client_ts_ms": time}]})
    assert event.transitions == (Transition(("w",), None if time is None else float(time)),)


def test_a_composite_is_all_or_nothing():
    """One bad part refuses the whole; good ones come together, however often input_types names them."""
    parts = {"camera_actions": [["w"]], "prompt": "rain"}
    both = {"input_types": ["camera_actions", "prompt"]} | parts
    expected = (ScriptEvent((("w",),)), PromptEvent("rain"))
    assert parse_event("composite_input", both) == expected
    assert parse_event("composite_input", both | {"input_types": both["input_types"] * 1000}) == expected
    with pytest.raises(InvalidEvent, match="'q'"):
        parse_event("composite_input", both | {"camera_actions": [["q"]]})


def test_a_refusal_never_spells_out_what_a_client_sent():
    """Huge and deep values are refused in a short line; a value nested too deep to print does not break the parser."""
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for payload in (deep, [0] * 1_000_000, b"x" * 1_000_000, {"mode": "x" * 1_000_000}):
        for kind in ("prompt", "camera_actions", "camera_poses"):
            with pytest.raises(InvalidEvent) as error:
                parse_event(kind, payload)
            assert len(str(error.value)) < 200


def test_a_walk_of_20_000_frames_is_exact_and_flat():
    """Poses after 20,000 frames equal a direct computation, in the bytes of state that the first frames took."""
    random = np.random.default_rng(3)
    walk = [tuple(TOKENS[i] for i in np.flatnonzero(row)) for row in random.random((20_000, 8)) < 0.2]
    path = CameraPath()
    path.extend(tuple(walk[:30]))
    state = len(pickle.dumps(path))
    for start in range(30, len(walk), 1000):
        tail = path.extend(tuple(walk[start : start + 1000]))
    assert len(pickle.dumps(path)) <= state + 16
    np.testing.assert_allclose(path.pose[:3, 3], end_of(walk), atol=1e-9)
    np.testing.assert_allclose(path.pose[:3, :3] @ path.pose[:3, :3].T, np.eye(3), atol=1e-14)
    assert np.linalg.norm(tail[:, :3, 3], axis=-1).max() <= 1


def end_of(walk: list[tuple[str, ...]]) -> np.ndarray:
    """The position after ``walk``: the sum of its steps in extended precision."""
    along, across, turn, tilt = (
        np.array([(more in held) - (less in held) for held in walk]) for more, less in ("ws", "da", "lj", "ik")
    )
    pitch = list(accumulate(4 * tilt, lambda at, step: at + step if abs(at + step) <= PITCH_LIMIT_DEGREES else at))
    yaw = np.deg2rad(6 * np.cumsum(turn).astype(np.longdouble))
    flat = np.abs(np.cos(np.deg2rad(np.array(pitch, np.longdouble))))
    # The reference normalises the flattened axis with 1e-6 in the denominator; pitch shortens the forward one.
    forward, right = along * flat / (flat + 1e-6), across / np.longdouble(1 + 1e-6)
    x, z = forward * np.sin(yaw) + right * np.cos(yaw), forward * np.cos(yaw) - right * np.sin(yaw)
    return (np.longdouble(0.05) * np.array([x.sum(), 0, z.sum()])).astype(float)


@given(st.lists(actions.filter(bool), min_size=1, max_size=4))
@settings(max_examples=30)
def test_relative_poses_chain_to_the_pose(chunks):
    """Undoing the scale, the product of relative poses is the way from the first pose to the last."""
    path, scaled, longest = CameraPath(), [], []
    first = None
    for chunk in chunks:
        scaled.append(path.extend(chunk))
        longest.append(path._longest)
        if first is None:
            first = CameraPath()
            first.extend(chunk[:1])
    total = first.pose
    for relative, scale in zip(scaled, longest, strict=True):
        for pose in relative:
            pose = pose.copy()
            pose[:3, 3] *= scale or 1
            total = total @ pose
    np.testing.assert_allclose(total, path.pose, atol=1e-9)
    np.testing.assert_allclose(invert(total) @ total, np.eye(4), atol=1e-9)


def test_intrinsics_do_not_depend_on_size():
    """The focal length is 500 pixels at every size, the centre is the picture's."""
    assert intrinsics(FrameSize(832, 480)) == (500, 500, 416, 240)
