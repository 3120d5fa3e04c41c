"""Camera paths of NumPy arrays: reduced to latent frames, checked before they are sent."""

from __future__ import annotations

import warnings

import msgspec
import numpy as np
import pytest

from lingbot_rt.client import poses_payload, read_poses
from lingbot_rt.client.protocol import ClientProtocol
from lingbot_rt.errors import EventRefused
from lingbot_rt.session.controls import parse_event

from .test_protocol import RecordingSession

FRAMES = 26
"""Pixel frames of the path: the last one belongs to no whole latent frame."""

POSES = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
POSES[:, 2, 3] = np.arange(FRAMES) ** 1.5 / 10
LENSES = np.stack([[500 + i, 400, 416, 240] for i in range(FRAMES)]).astype(np.float32)


def test_every_fourth_pose_is_that_of_a_latent_frame():
    """Pixel frames 0, 4 ... 24 of 26, with their intrinsics, for a picture of 832x480; the longest step is stated."""
    payload = poses_payload(POSES, LENSES)
    assert np.array_equal(payload["poses"], POSES[0:25:4])
    assert np.array_equal(payload["intrinsics"], LENSES[0:25:4])
    assert (payload["size"], payload["anchor"]) == ("832x480", "camera")
    assert payload["longest_step"] == pytest.approx(POSES[24, 2, 3] - POSES[20, 2, 3])
    assert parse_event("camera_poses", msgspec.msgpack.decode(msgspec.msgpack.encode(payload)))
    each = poses_payload(POSES.tolist(), every=1, anchor="session")
    assert np.array_equal(each["poses"], POSES)
    assert "intrinsics" not in each


@pytest.mark.parametrize("lens", [LENSES[0], LENSES[:1], np.tile(LENSES[0], (FRAMES + 5, 1))])
def test_a_lens_that_does_not_change_is_sent_once(lens):
    """As one row, as a file of one row, and as equal rows, of which there may be more than poses."""
    assert poses_payload(POSES, lens, size="1280x720")["intrinsics"] == [500, 400, 416, 240]


def test_follow_sends_one_event_and_lets_go_of_the_keys():
    """The event has the next id; a key pressed afterwards is held alone."""
    session = RecordingSession()
    session.press("w")
    assert session.follow(POSES, LENSES, anchor="session") == 2
    session.press("l")
    event = session.messages[1]
    assert (event["kind"], event["event_id"]) == ("camera_poses", 2)
    assert event["payload"] == poses_payload(POSES, LENSES, anchor="session")
    assert session.messages[2]["payload"]["transitions"][0]["actions"] == ["l"]


@pytest.mark.parametrize(
    ("poses", "lens", "text"),
    [
        (POSES[:, :3], None, r"poses: an array of shape \[26, 3, 4\], expected numbers of \[n, 4, 4\]"),
        ("poses.npy", None, "poses: an array of shape no numbers, expected"),
        ([[1, 2], [3]], None, "poses: an array of shape no numbers, expected"),
        (POSES[:0], None, "poses: 0 matrices"),
        (
            np.tile(np.eye(4), (2050, 1, 1)),
            None,
            r"poses: 513 matrices, expected 1 to 512.*\(latent frame i is pose 4 i\)",
        ),
        (POSES * np.nan, None, r"poses\[0\]\[0\]\[0\]: nan, expected a finite number"),
        (POSES, LENSES[:20], "intrinsics: 20 rows for 26 poses"),
        (POSES, np.zeros((26, 3)), r"intrinsics: an array of shape \[26, 3\], expected numbers of \[4\] or \[n, 4\]"),
        (POSES, -LENSES, r"intrinsics\[0\]\[0\]: fx is -500, expected pixels"),
    ],
)
def test_what_a_server_would_refuse_is_not_sent(poses, lens, text):
    """Shapes and values are checked here, with the server's own words, and the session keeps its keys."""
    session = RecordingSession()
    session.press("w")
    with pytest.raises(EventRefused, match=rf"^invalid event: camera_poses\.{text}"):
        session.follow(poses, lens)
    assert len(session.messages) == 1
    session.press("l")
    assert session.messages[1]["payload"]["transitions"][0]["actions"] == ["w", "l"]


def test_options_of_a_path_are_checked():
    """By name and value. Errors that are about no latent frame speak of none."""
    for every in (0, -1, 2.5, True):
        with pytest.raises(
            EventRefused, match=rf"^every: '{every}', expected pixel frames per latent frame: 1 or more"
        ):
            poses_payload(POSES, every=every)
    for options, text in (({"anchor": "world"}, "anchor: 'world'"), ({"size": "8x"}, "size: '8x'")):
        with pytest.raises(EventRefused, match=f"camera_poses.{text}, expected") as caught:
            poses_payload(POSES, LENSES, **options)
        assert "latent frame" not in str(caught.value)


def test_a_rotation_that_is_none_is_warned_of():
    """The nearest rotation is sent, and Python's own warning says where; float32 is exact enough."""
    scaled = POSES.copy()
    scaled[8, :3, :3] *= 1.1
    with pytest.warns(UserWarning, match=r"camera_poses\.poses\[2\]: the rotation is orthonormal to 0.21 only"):
        payload = poses_payload(scaled)
    assert np.allclose(payload["poses"], POSES[:26:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poses_payload(POSES)


def test_a_folder_of_examples(tmp_path):
    """poses.npy and, if it is there, intrinsics.npy; files by name. What is no array is named, a pickle is not read."""
    np.save(tmp_path / "poses.npy", POSES)
    assert np.array_equal(read_poses(tmp_path)[0], POSES)
    assert read_poses(tmp_path)[1] is None
    np.save(tmp_path / "intrinsics.npy", LENSES)
    assert np.array_equal(read_poses(tmp_path)[1], LENSES)
    np.save(tmp_path / "other.npy", LENSES[0])
    assert np.array_equal(read_poses(tmp_path / "poses.npy", tmp_path / "other.npy")[1], LENSES[0])
    assert read_poses(tmp_path / "poses.npy")[1] is None
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=POSES)
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects.npy", "several.npz", "text.npy", "empty.npy", "missing.npy"):
        with pytest.raises(EventRefused, match=rf"{name}'.*expected a NumPy file \(\.npy\)") as caught:
            read_poses(tmp_path / name)
        assert "pickle" not in str(caught.value)


def test_warnings_of_the_server_are_kept():
    """A session that asked for them has them by the place they are about."""
    protocol = ClientProtocol()
    message = {"type": "warning", "field": "camera_poses.poses[0]", "content": "the nearest rotation is used"}
    assert protocol.receive(msgspec.msgpack.encode(message)) == []
    assert list(protocol.warnings) == ["camera_poses.poses[0]: the nearest rotation is used"]
