"""The condition queue and the camera path against the reference's own traces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.controls import ConditionQueue, parse_event, parse_script
from lingbot_rt.shapes import FrameSize, intrinsics
from tests.conftest import GOLDEN

TRACES = json.loads((GOLDEN / "control/control_traces.json").read_text())["traces"]
CAMERA = json.loads((GOLDEN / "camera/camera.json").read_text())


def as_lists(actions):
    return None if actions is None else [list(keys) for keys in actions]


OURS = {
    # The newest event in force is named, whatever its kind: the prompt's 41, not the 40 of the key held since before.
    ("prompt_and_camera", 3): {"latest_sampled_event_id": 41},
    ("prompt_and_camera", 4): {"latest_sampled_event_id": 41},
    # A tap is not lost because another key is held after it: the reference looks at the newest pressed key only.
    ("pulse_then_other_hold", 1): {"condition_inputs": {"camera_actions": [["w"], ["d"], ["d"]]}},
}
"""(trace, step) -> where we leave the reference on purpose."""

REFUSED = {"script_overflow"}
"""Scripts over the limit: the reference drops their beginning in silence, here they are refused with the number."""


@pytest.mark.parametrize("trace", TRACES, ids=[trace["name"] for trace in TRACES])
def test_control_traces(trace):
    """Every sampled prompt, key and event id of the reference's 30 traces comes out the same, but for ``OURS``."""
    script = trace["init_camera_actions"]
    queue = ConditionQueue("P0", None if script is None else parse_script(script))
    prompt = "P0"
    for number, step in enumerate(trace["steps"]):
        op, expected = step["op"], step["result"]
        match op["op"]:
            case "event" if "error" in expected:
                with pytest.raises(InvalidEvent):
                    parse_event(op["kind"], op["payload"])
            case "event":
                if trace["name"] in REFUSED:
                    with pytest.raises(InvalidEvent, match="at most 512"):
                        parse_event(op["kind"], op["payload"])
                    return
                queue.apply(parse_event(op["kind"], op["payload"]), op["event_id"])
            case "sample_chunk":
                got = queue.sample(3)
                conditions = {}
                if got.prompt != prompt:
                    conditions["lingbot_prompt_updated"] = True
                prompt = got.prompt
                if got.camera_actions is not None:
                    conditions["camera_actions"] = as_lists(got.camera_actions)
                assert {
                    "prompt": got.prompt,
                    "condition_inputs": conditions,
                    "latest_sampled_event_id": got.event_id,
                } == expected | OURS.get((trace["name"], number), {})
            case "sample_camera":
                got = queue.sample(op["chunk_size"])
                assert as_lists(got.camera_actions) == expected["actions"]
                assert got.event_id == expected["latest_sampled_event_id"]
            case "clear":
                queue = ConditionQueue(prompt)
            case other:
                raise AssertionError(f"unknown op {other}")
        assert queue.pending <= 512


@pytest.mark.parametrize("name", CAMERA["scripts"])
def test_poses_of_the_golden_scripts(name, golden):
    """Poses agree to 1e-12, relative poses to the float32 they are stored in."""
    arrays = np.load(golden("camera/camera_scripts.npz"))
    actions = tuple(tuple(keys) for keys in CAMERA["scripts"][name]["actions"])
    path = CameraPath()
    poses = []
    for keys in actions:
        path.extend((keys,))
        poses.append(path.pose)
    np.testing.assert_allclose(np.stack(poses), arrays[f"{name}.c2ws"][1:], atol=1e-12)
    np.testing.assert_allclose(CameraPath().extend(actions), arrays[f"{name}.rel_f32"], atol=1e-5)


def test_a_script_walked_chunk_by_chunk_ends_like_one_walk(golden):
    """The running maximum makes the last chunk of a long walk equal to the tail of the whole one."""
    actions = tuple(tuple(keys) for keys in CAMERA["scripts"]["long_history_120"]["actions"])
    path = CameraPath()
    for start in range(0, len(actions), 3):
        last = path.extend(actions[start : start + 3])
    np.testing.assert_allclose(last, CameraPath().extend(actions)[-3:], atol=1e-12)


def rays_at_corners(relative, width, height):
    """Origin and direction, [F, 6, h, w], of the ray through the first pixel of each 8x8 cell."""
    fx, fy, cx, cy = intrinsics(FrameSize(width, height))
    y, x = np.mgrid[0:height:8, 0:width:8] + 0.5
    rays = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones_like(x)])
    directions = np.einsum("fij,jyx->fiyx", relative[:, :3, :3], rays / np.linalg.norm(rays, axis=0))
    origins = np.broadcast_to(relative[:, :3, 3, None, None], directions.shape)
    return np.concatenate([origins, directions], axis=1)


@pytest.mark.parametrize("trace", dict.fromkeys(step["trace"] for step in CAMERA["incremental"]))
def test_chunks_of_the_reference_session(trace, golden):
    """Chunk by chunk, with gaps without keys and other chunk lengths, rays are those of the reference's session.

    Left out: chunks longer than the whole history, which the reference pads; the condition queue never gives fewer
    entries than a chunk has latent frames.
    """
    arrays = np.load(golden("camera/camera_incremental.npz"))
    path, compared, walked = CameraPath(), 0, 0
    for step in CAMERA["incremental"]:
        if step["trace"] != trace:
            continue
        if step["actions"]:
            relative = path.extend(parse_script(step["actions"]))
            walked += len(relative)
        assert walked == step["history_len"]
        if step["result_is_none"] or walked < step["chunk_size"]:
            continue
        expected = arrays[f"{trace}.chunk{step['chunk']}_f32"][0, ::64].swapaxes(0, 1)
        got = rays_at_corners(relative, 96, 64)[..., ::2, ::3]
        np.testing.assert_allclose(got[-len(expected) :], expected, atol=1e-5)
        compared += 1
    assert compared


@pytest.mark.parametrize(("key", "back"), [("i", "k"), ("k", "i")])
def test_a_step_past_the_pitch_limit_is_dropped_whole(key, back):
    """The camera stops at 84 degrees, not at 85, and turns back from there at once."""
    path = CameraPath()
    path.extend(((key,),) * 30)
    assert np.degrees(np.arccos(path.pose[1, 1])) == pytest.approx(84)
    path.extend(((back,),))
    assert np.degrees(np.arccos(path.pose[1, 1])) == pytest.approx(80)
