"""Whole sessions, condition queue to pixels, against the reference's frames."""

from __future__ import annotations

import numpy as np
import pytest

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.controls import ConditionQueue, parse_event, parse_script
from lingbot_rt.session.plan import ChunkPlan, FrameGroup


def psnr(got: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((got.astype(np.float64) - expected) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


CASES = [
    ("A1_script", 0),
    ("A2_no_actions", 0),
    ("A3_prompt_event", 0),
    ("A3_prompt_event", 1),
    ("A4_sink_window", 0),
]


@pytest.mark.parametrize(("name", "alternative"), CASES)
def test_frames_equal_the_references(pipeline, session_plan, golden_session, name, alternative):
    """Every chunk of every golden session is within one grey level of the reference, at 80 dB or better."""
    record, arrays = golden_session(name)
    expected = record["alternatives"][alternative]
    init = record["init"]
    script = init.get("condition_inputs", {}).get("camera_actions")
    queue = ConditionQueue(init["prompt"], None if script is None else parse_script(script))
    camera = CameraPath()
    plan = session_plan(init)
    session = SessionState(pipeline, plan)
    for index, array in enumerate(expected["chunks"]):
        for entry, applied_at in zip(record["events"], expected["applied_at"], strict=False):
            if applied_at == index:
                event = entry["event"]
                queue.apply(parse_event(event["kind"], event["payload"]), event.get("event_id"))
        conditions = queue.sample(plan.latent_frames)
        poses = None if conditions.camera_actions is None else camera.extend(conditions.camera_actions)
        groups: list[FrameGroup] = []
        chunk = ChunkPlan(plan.session_id, index, conditions.prompt, poses, conditions.event_id)
        result = run_chunk(pipeline, session, chunk, groups.append)

        frames = np.concatenate([group.pixels for group in groups])
        assert conditions.event_id == expected["event_id"][index]
        assert result.num_frames == len(frames) == record["frames_per_chunk"][index]
        assert np.abs(frames.astype(int) - arrays[array]).max() <= 1
        assert psnr(frames, arrays[array]) >= 80


def test_intermediates_of_the_script(pipeline, session_plan, golden_session, golden):
    """Image condition and prompt embeddings of a real checkpoint folder equal the reference's."""
    record, _ = golden_session("A1_script")
    expected = np.load(golden("e2e/A1_script/intermediates.npz"))
    session = SessionState(pipeline, session_plan(record["init"]))
    condition = np.concatenate([session.condition(0).numpy(), session.condition(1).numpy()], axis=2)
    assert np.abs(condition - expected["condition"]).max() <= 2e-5
    rows = expected["prompt_embeds_rows"].reshape(-1, expected["prompt_embeds_rows"].shape[-1])
    embeds = pipeline.text_encoder.encode(record["init"]["prompt"])[0].numpy()
    assert np.abs(embeds[: len(rows)] - rows).max() <= 2e-5
    assert not embeds[len(rows) :].any()
