"""The condition queue and the camera path against the reference's own traces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lingbot_rt.control.camera_path import CameraPath
from lingbot_rt.control.condition_queue import ConditionQueue
from lingbot_rt.control.events import parse_event, parse_script
from lingbot_rt.errors import InvalidEvent
from tests.conftest import GOLDEN

TRACES = json.loads((GOLDEN / "control/control_traces.json").read_text())["traces"]
CAMERA = json.loads((GOLDEN / "camera/camera.json").read_text())


def as_lists(actions):
    return None if actions is None else [list(keys) for keys in actions]


@pytest.mark.parametrize("trace", TRACES, ids=[trace["name"] for trace in TRACES])
def test_control_traces(trace):
    """Every sampled prompt, key and event id of the reference's 30 traces comes out the same."""
    script = trace["init_camera_actions"]
    queue = ConditionQueue("P0", None if script is None else parse_script(script))
    event_id = None
    for step in trace["steps"]:
        op, expected = step["op"], step["result"]
        match op["op"]:
            case "event" if "error" in expected:
                with pytest.raises(InvalidEvent):
                    parse_event(op["kind"], op["payload"])
            case "event":
                queue.apply(parse_event(op["kind"], op["payload"]), op["event_id"])
            case "sample_chunk":
                got = queue.sample(3)
                conditions = {}
                if got.prompt_updated:
                    conditions["lingbot_prompt_updated"] = True
                if got.camera_actions is not None:
                    conditions["camera_actions"] = as_lists(got.camera_actions)
                event_id = got.event_id
                assert {
                    "prompt": got.prompt,
                    "condition_inputs": conditions,
                    "latest_sampled_event_id": event_id,
                } == expected
            case "sample_camera":
                got = queue.sample(op["chunk_size"])
                assert as_lists(got.camera_actions) == expected["actions"]
                assert got.event_id == expected["latest_sampled_event_id"]
            case "clear":
                queue.clear()
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
