"""Camera poses instead of keys: what they give, how they continue, and what is refused."""

from __future__ import annotations

import copy

import msgspec
import numpy as np
import pytest

from lingbot_rt.client import poses_payload
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session.camera_path import CameraPath, invert
from lingbot_rt.session.controls import MAX_PENDING, parse_event, payload_of
from lingbot_rt.session.messages import MAX_EVENT_BYTES, MAX_EVENT_VALUES, Event, Init, decode
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.shapes import FrameSize, intrinsics
from tests.server.conftest import state
from tests.server.fake_engine import CARD

WALK = [["w"], ["w", "l"], ["w", "d"], ["i"], [], ["s", "k"], ["a", "j"], ["w"], ["w", "l"], ["l"], ["w"], ["d"]]
"""Twelve latent frames with steps of different length, turns, tilts and a rest."""


def session(keep_events: bool = False, **fields) -> Session:
    init = Init(prompt="A street.", first_frame=b"x", **{"size": "64x64"} | fields)
    return Session("s", resolve(init, CARD, ServeConfig()), keep_events=keep_events)


def poses_of(walk: list[list[str]]) -> list[list[list[float]]]:
    """The camera after each entry of ``walk``, c2w."""
    path, poses = CameraPath(), []
    for keys in walk:
        path.extend((tuple(keys),))
        poses.append(path.pose.tolist())
    return poses


def relative(it: Session, chunks: int) -> np.ndarray:
    return np.stack([it.next_chunk(0).plan.relative_poses for _ in range(chunks)])


def send(it: Session, kind: str, payload, **fields) -> list[dict]:
    event = decode(msgspec.msgpack.encode({"type": "event", "kind": kind, "payload": payload} | fields))
    return [msgspec.msgpack.decode(message) for message in it.receive(event, now=0)]


def turned(axis: int, degrees: float, position=(0.0, 0.0, 0.0)) -> np.ndarray:
    """c2w of a camera turned about one of its axes."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    pose = np.eye(4)
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    pose[a, a] = pose[b, b] = c
    pose[a, b], pose[b, a] = -s, s
    pose[:3, 3] = position
    return pose


def test_a_path_made_by_keys_moves_as_the_keys_do():
    """Bit for bit, in an init as in an event, and neutral after its end."""
    by_keys = relative(session(condition_inputs={"camera_actions": WALK}), 5)
    assert np.array_equal(by_keys, relative(session(condition_inputs={"camera_poses": poses_of(WALK)}), 5))
    it = session()
    send(it, "camera_poses", {"poses": poses_of(WALK)})
    assert np.array_equal(by_keys, relative(it, 5))
    assert np.allclose(by_keys[4], np.eye(4), atol=1e-12)


def test_keys_then_poses_then_keys():
    """A path in the session's coordinates takes over from keys, and held keys from its last pose, bit for bit."""
    by_keys = relative(session(condition_inputs={"camera_actions": WALK + [["w", "i"]] * 3}), 5)
    it = session(condition_inputs={"camera_actions": WALK[:3]})
    got = [relative(it, 1)]
    send(it, "camera_poses", poses_of(WALK)[3:])
    got.append(relative(it, 3))
    send(it, "camera_actions", state("w", "i"))
    got.append(relative(it, 1))
    assert np.array_equal(by_keys, np.concatenate(got))


def test_paths_that_follow_each_other_are_one_path():
    """A path sent in pieces, one event per chunk, moves the camera as the whole does."""
    poses = poses_of(WALK)
    whole = relative(session(condition_inputs={"camera_poses": poses}), 4)
    it, got = session(), []
    for start in range(0, 12, 3):
        send(it, "camera_poses", {"poses": poses[start : start + 3]})
        got.append(relative(it, 1))
    assert np.array_equal(whole, np.concatenate(got))


def test_the_world_of_a_path_is_the_clients_own():
    """Another origin and other axes of the world give the same way; a path is placed at the camera on request."""
    world = turned(1, 33, (5, -2, 7)) @ turned(0, 20)
    moved = (world @ np.array(poses_of(WALK))).tolist()
    by_keys = relative(session(condition_inputs={"camera_actions": WALK}), 4)
    assert np.allclose(by_keys, relative(session(condition_inputs={"camera_poses": moved}), 4), atol=1e-12)
    it = session(condition_inputs={"camera_actions": [["w"], ["l"], ["w"]]})
    relative(it, 1)
    send(it, "camera_poses", {"poses": moved, "anchor": "camera"})
    placed = relative(it, 4)
    assert np.allclose(placed[0, 0], np.eye(4), atol=1e-12)  # its first pose is where the camera is
    assert np.allclose(placed.reshape(12, 4, 4)[1:], by_keys.reshape(12, 4, 4)[1:], atol=1e-9)


@pytest.mark.parametrize("pose", [turned(2, 30), turned(0, 88) @ turned(1, 5), turned(0, 90), turned(1, 12.5)])
def test_keys_go_on_from_any_pose(pose):
    """A rolled camera, one above the keys' limit of 85 degrees and one between whole degrees: it rests, it turns."""
    it = session(condition_inputs={"camera_poses": [pose.tolist()] * 3})
    relative(it, 1)
    rest = relative(it, 1)[0]
    assert np.allclose(rest, np.eye(4), atol=1e-7)
    send(it, "camera_actions", state("l"))
    turn = relative(it, 1)[0, 0, :3, :3]
    assert np.allclose(pose[:3, :3] @ turn @ pose[:3, :3].T, turned(1, 6)[:3, :3], atol=1e-7)


def test_a_camera_beyond_the_pitch_limit_can_turn_back():
    """From 88 degrees k brings it down and i does nothing; below the limit both turn."""
    it = session(condition_inputs={"camera_poses": [turned(0, 88).tolist()] * 3})
    relative(it, 1)
    send(it, "camera_actions", state("i"))
    assert np.allclose(relative(it, 1)[0], np.eye(4), atol=1e-7)
    send(it, "camera_actions", state("k"))
    assert np.allclose(relative(it, 1)[0, :, :3, :3], turned(0, -4)[:3, :3], atol=1e-7)


def test_a_stated_longest_step_counts_from_the_first_chunk():
    """Steps are divided by the longest so far, or by the longest that the path says is coming."""
    poses = [turned(0, 0, (0, 0, z)).tolist() for z in (0, 1, 2, 3, 5, 7)]

    def steps(**fields) -> np.ndarray:
        it = session(condition_inputs={"camera_poses": {"poses": poses} | fields})
        return np.linalg.norm(relative(it, 2)[..., :3, 3], axis=-1)

    assert np.allclose(steps(), [[0, 1, 1], [0.5, 1, 1]])
    assert np.allclose(steps(longest_step=2), [[0, 0.5, 0.5], [0.5, 1, 1]])


@pytest.mark.parametrize("anchor", ["session", "camera"])
def test_a_camera_that_stands_still_does_not_shake(anchor):
    """What is only rounding of a far position is no step: it is not the longest one, and nothing is scaled by it."""
    random = np.random.default_rng(2)
    for _ in range(10):
        still = turned(1, random.uniform(0, 360), random.normal(size=3) * 100) @ turned(0, random.uniform(-60, 60))
        poses = [still.tolist()] * 6 + [(still @ turned(1, 0, (0, 0, 0.02))).tolist()] * 3
        it = session(condition_inputs={"camera_poses": {"poses": poses, "anchor": anchor}})
        lengths = np.linalg.norm(relative(it, 3)[..., :3, 3], axis=-1).flatten()
        assert np.allclose(lengths, [0, 0, 0, 0, 0, 0, 1, 0, 0], atol=1e-9)


def test_a_path_of_pixel_frames_gives_what_the_public_utilities_define():
    """inv(c2w[i-1]) c2w[i] of every fourth pose, translations divided by the longest of the whole path."""
    frames = np.stack([turned(1, 3 * i) @ turned(0, i, (0.1 * i, 0.02 * i**1.5, 0.3)) for i in range(49)])
    it = session(condition_inputs={"camera_poses": poses_payload(frames.astype(np.float32))})
    latent = frames[::4]
    expected = np.concatenate([[np.eye(4)], np.linalg.inv(latent[:-1]) @ latent[1:]])
    expected[:, :3, 3] /= np.linalg.norm(expected[:, :3, 3], axis=-1).max()
    assert np.allclose(np.concatenate(relative(it, 5))[:13], expected, atol=1e-5)


@pytest.mark.parametrize("first", ["script", "state", "poses"])
def test_poses_keys_and_scripts_replace_each_other(first):
    """Whatever waits is dropped for the newer one; the id is that of the newer one."""
    poses = poses_of([["l"]] * 9)
    events = {"script": ("camera_actions", [["w"]] * 9), "state": ("camera_actions", state("w"))}
    events["poses"] = ("camera_poses", poses)
    second = "script" if first == "poses" else "poses"
    it, alone = session(), session()
    send(it, *events[first], event_id=1)
    send(it, *events[second], event_id=2)
    send(alone, *events[second], event_id=2)
    for _ in range(4):
        got, expected = it.next_chunk(0).plan, alone.next_chunk(0).plan
        assert np.array_equal(got.relative_poses, expected.relative_poses)
        assert got.event_id == expected.event_id


def test_the_lens_of_a_path_stays_until_the_next_path():
    """Intrinsics are scaled to the session's size, one for all or one per pose; without any the lens is the model's."""
    per_pose = [[100.0 + i, 200, 40, 30] for i in range(4)]
    fields = {"poses": poses_of(WALK[:4]), "intrinsics": per_pose, "size": "80x60"}
    it = session(size="160x64", condition_inputs={"camera_poses": fields})
    scale = np.array([2, 64 / 60] * 2)
    lenses = np.stack([it.next_chunk(0).plan.intrinsics for _ in range(2)]).reshape(6, 4)
    assert np.allclose(lenses, np.array([*per_pose, per_pose[-1], per_pose[-1]]) * scale)
    send(it, "camera_actions", state("w"))
    assert np.allclose(it.next_chunk(0).plan.intrinsics, per_pose[-1] * scale)
    send(it, "camera_poses", {"poses": poses_of(WALK)[4:5], "intrinsics": [50, 60, 70, 80]})
    assert np.allclose(it.next_chunk(0).plan.intrinsics, [50, 60, 70, 80])  # of the session's own size
    send(it, "camera_poses", poses_of(WALK)[5:6])
    assert it.next_chunk(0).plan.intrinsics is None
    own = {"poses": poses_of(WALK), "intrinsics": list(intrinsics(FrameSize(160, 64)))}
    it = session(size="160x64", condition_inputs={"camera_poses": own})
    assert np.array_equal(it.next_chunk(0).plan.intrinsics, [intrinsics(FrameSize(160, 64))] * 3)


def test_rotations_that_are_none_become_the_nearest():
    """Within 1e-3 without a word; beyond it the client of the extension hears how far, where and how many."""
    exact = turned(1, 20) @ turned(0, 10)
    near, far = exact.copy(), exact.copy()
    near[:3, :3] *= 1 + 1e-4
    far[:3, :3] *= 1.05
    expected = relative(session(condition_inputs={"camera_poses": [exact.tolist(), np.eye(4).tolist()] * 2}), 1)
    for pose, warned in ((near, False), (far, True)):
        poses = [pose.tolist(), np.eye(4).tolist()] * 2
        it = session(condition_inputs={"camera_poses": poses}, protocol_extensions=["warning"])
        chunk = it.next_chunk(0)
        assert np.allclose(chunk.plan.relative_poses, expected[0], atol=1e-12)
        messages = [msgspec.msgpack.decode(message) for message in chunk.acknowledgements]
        assert [message["type"] for message in messages] == ["warning"] * warned
        if warned:
            assert messages[0]["field"] == "condition_inputs.camera_poses.poses[0]"
            assert "orthonormal to 0.1 only, expected 0.001" in messages[0]["content"]
            assert "2 of 4" in messages[0]["content"]
        answers = send(it, "camera_poses", poses, event_id=7)
        assert [(message["type"], message["event_id"]) for message in answers] == [("warning", 7)] * warned
        assert send(session(), "camera_poses", poses, event_id=7) == []  # nobody asked to be warned


GOOD = np.eye(4).tolist()


def changed(place: tuple[int, ...], value) -> list:
    """Three good poses with one number, row or matrix replaced."""
    poses = [copy.deepcopy(GOOD) for _ in range(3)]
    inner = poses
    for index in place[:-1]:
        inner = inner[index]
    inner[place[-1]] = value
    return poses


WRONG = [
    ("w", "", "'w' is not a list of matrices"),
    ({"intrinsics": [1, 2, 3, 4]}, "", 'or a map with "poses"'),
    ([], ".poses", "0 matrices, expected 1 to 512"),
    ([GOOD] * 513, ".poses", "513 matrices, expected 1 to 512"),
    ({"poses": b"x" * 128}, ".poses", r"128 bytes \(bin\), expected 1 to 512 matrices"),
    (changed((1,), [1] * 16), ".poses[1]", "expected 4 rows of 4 numbers"),
    (changed((1, 2), [0, 0, 1]), ".poses[1][2]", r"\[0, 0, 1\], expected 4 numbers"),
    (changed((2, 0, 3), float("nan")), ".poses[2][0][3]", "nan, expected a finite number, at most 1,000,000"),
    (changed((2, 0, 3), float("inf")), ".poses[2][0][3]", "inf, expected a finite number"),
    (changed((2, 0, 3), "1"), ".poses[2][0][3]", "'1', expected a finite number"),
    (changed((2, 0, 3), True), ".poses[2][0][3]", "True, expected a finite number"),
    (changed((2, 0, 3), 2**63), ".poses[2][0][3]", "9223372036854775808, expected a finite number"),
    (changed((1, 3), [1, 2, 3, 1]), ".poses[1][3]", r"\[1, 2, 3, 1\], expected \[0, 0, 0, 1\].*last column"),
    (changed((1, 0, 0), -1), ".poses[1]", "determinant -1, expected a rotation.*OpenCV"),
    (changed((1, 0, 0), 0), ".poses[1]", "determinant 0, expected a rotation"),
    (changed((2, 0, 3), 1500), ".poses[2]", "1500 units from the pose before it, expected at most 1000 per latent"),
    ({"poses": [GOOD], "anchor": "world"}, ".anchor", "'world', expected one of session, camera"),
    ({"poses": [GOOD], "anchor": [1]}, ".anchor", r"\[1\], expected one of"),
    ({"poses": [GOOD], "anchor": False}, ".anchor", "False, expected one of"),
    ({"poses": [GOOD], "longest_step": -1}, ".longest_step", "-1, expected world units from 0 to 1000"),
    ({"poses": [GOOD], "intrinsics": 500}, ".intrinsics", "500, expected 4 numbers"),
    ({"poses": [GOOD], "intrinsics": [500, 500, 32]}, ".intrinsics", r"\[500, 500, 32\], expected 4 numbers"),
    ({"poses": [GOOD] * 2, "intrinsics": [[5, 5, 3, 3]] * 3}, ".intrinsics", "3 rows for 2 poses"),
    ({"poses": [GOOD], "intrinsics": [500, -500, 32, 32]}, ".intrinsics[1]", "fy is -500, expected pixels, 1 or more"),
    ({"poses": [GOOD], "intrinsics": [0.6, 1, 0.5, 0.5]}, ".intrinsics[0]", "fx is 0.6, expected pixels"),
    ({"poses": [GOOD], "intrinsics": [[500, 500, 0, 32]]}, ".intrinsics[0][2]", "cx is 0, expected pixels, above 0"),
    ({"poses": [GOOD], "intrinsics": [500, 500, float("inf"), 32]}, ".intrinsics[2]", "inf, expected a finite"),
    ({"poses": [GOOD], "size": "0x64"}, ".size", "'0x64', expected WIDTHxHEIGHT of the pictures"),
    ({"poses": [GOOD], "size": 832}, ".size", "832, expected WIDTHxHEIGHT"),
]


@pytest.mark.parametrize(("payload", "place", "text"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(payload, place, text):
    """Field, value and what is expected, in one line, in an event as in an init; nothing moves then."""
    with pytest.raises(InvalidEvent, match=text) as error:
        parse_event("camera_poses", payload)
    assert error.value.field == f"camera_poses{place}"
    assert len(str(error.value)) < 300
    with pytest.raises(InvalidInit, match=text) as error:
        session(condition_inputs={"camera_poses": payload})
    assert error.value.field == f"condition_inputs.camera_poses{place}"


def test_two_kinds_of_control_in_one_init_are_refused():
    """Each would replace the other."""
    with pytest.raises(InvalidInit, match="both camera_actions and camera_poses") as error:
        session(condition_inputs={"camera_actions": [], "camera_poses": [GOOD]})
    assert error.value.field == "condition_inputs"


def test_a_path_that_begins_far_from_the_camera_is_refused():
    """Live, where the client can be told; the refusal names the way out, and the camera stays."""
    it = session(condition_inputs={"camera_actions": [["w"]]})
    far = [turned(0, 0, (2000, 0, 0)).tolist()] * 3
    send(it, "camera_poses", far)  # before the first chunk it is where the session begins
    it = session(condition_inputs={"camera_actions": [["w"]]})
    relative(it, 1)
    with pytest.raises(InvalidEvent, match=r"2000 units from the camera, expected at most 1000.*anchor") as error:
        send(it, "camera_poses", far)
    assert error.value.field == "camera_poses.poses[0]"
    assert np.allclose(relative(it, 1)[0], np.eye(4), atol=1e-12)
    send(it, "camera_poses", {"poses": far, "anchor": "camera"})


def test_the_longest_path_fits_into_an_event():
    """512 poses with a lens each, as float64: within the bytes and values of an event."""
    poses = [turned(1, i, (0.1 * i, 0.2, 0.3)).tolist() for i in range(MAX_PENDING)]
    lenses = [[500.5 + i, 500.25, 416.125, 240.0625] for i in range(MAX_PENDING)]
    payload = {"poses": poses, "intrinsics": lenses, "size": "832x480", "anchor": "camera", "longest_step": 0.1}
    message = msgspec.msgpack.encode({"type": "event", "kind": "camera_poses", "payload": payload, "event_id": 1})
    assert len(message) <= MAX_EVENT_BYTES // 2
    assert sum(len(row) + 1 for pose in poses for row in pose) + 6 * MAX_PENDING + 20 <= MAX_EVENT_VALUES
    event = decode(message, InvalidEvent)
    assert isinstance(event, Event)
    it = session(num_frames=81)
    it.receive(event, now=0)
    moved = np.concatenate([it.next_chunk(0).plan.relative_poses for _ in range(25)])[1:]
    assert (np.linalg.norm(moved[:, :3, 3], axis=-1) > 0).sum() == MAX_PENDING - 1


def test_a_record_keeps_paths_and_gives_the_same_way():
    """What a chunk was planned with parses to the same event again; a path that was replaced is not kept."""
    fields = {"poses": poses_of(WALK), "intrinsics": [450.5, 460, 400, 230], "size": "832x480"}
    fields |= {"anchor": "camera", "longest_step": 0.5}
    it = session(keep_events=True)
    relative_before = it.next_chunk(0).plan.relative_poses
    assert relative_before is None
    send(it, "camera_poses", poses_of([["s"]] * 100), event_id=1)
    both = {"input_types": ["prompt", "camera_poses"], "prompt": "Rain.", "camera_poses": poses_of([["s"]])}
    send(it, "composite_input", both, event_id=2)
    send(it, "camera_poses", fields, event_id=3)
    chunk = it.next_chunk(0)
    assert [(kind, event_id) for kind, _, event_id in chunk.events] == [("prompt", 2), ("camera_poses", 3)]
    kept = msgspec.json.decode(msgspec.json.encode(chunk.events[1][1]))
    assert kept == fields
    names = ("kind", "payload", "event_id")
    pinned = [{"chunk": 1} | dict(zip(names, event, strict=True)) for event in chunk.events]
    init = {"type": "init", "prompt": "A street.", "first_frame": b"x", "size": "64x64", "pinned_events": pinned}
    init = decode(msgspec.msgpack.encode(init | {"protocol_extensions": ["pinned_events"]}))
    replayed = Session("r", resolve(init, CARD, ServeConfig()))
    replayed.next_chunk(0)
    again = replayed.next_chunk(0).plan
    assert np.array_equal(again.relative_poses, chunk.plan.relative_poses)
    assert np.array_equal(again.intrinsics, chunk.plan.intrinsics)
    assert (again.event_id, again.prompt) == (3, "Rain.")
    (event,) = parse_event("camera_poses", kept)
    assert payload_of([event]) == ("camera_poses", kept)


def test_any_path_stays_a_chain_of_rigid_moves():
    """Relative poses chain to the path for random rotations, among them rolled and upside down cameras."""
    random = np.random.default_rng(5)
    poses = np.tile(np.eye(4), (30, 1, 1))
    poses[:, :3, :3] = np.linalg.qr(random.normal(size=(30, 3, 3)))[0]
    poses[:, :3, :3] *= np.sign(np.linalg.det(poses[:, :3, :3]))[:, None, None]
    poses[:, :3, 3] = random.normal(size=(30, 3))
    longest = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=-1).max()
    it = session(condition_inputs={"camera_poses": {"poses": poses.tolist(), "longest_step": float(longest)}})
    at = poses[0]
    for number, move in enumerate(relative(it, 10).reshape(30, 4, 4)):
        move[:3, 3] *= longest
        at = at @ move if number else at
        assert np.allclose(at, poses[number], atol=1e-9)
    assert np.allclose(invert(at) @ at, np.eye(4), atol=1e-9)
