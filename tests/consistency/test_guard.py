"""The verdict on played cases: passes on equal bytes, names each way to differ."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.consistency.cases import Case, Thresholds
from lingbot_rt.consistency.ground_truth import PlayedCase, PlayedChunk, read_truth, write_truth
from lingbot_rt.consistency.guard import compare
from lingbot_rt.consistency.report import as_json, table, write_report
from lingbot_rt.errors import ConfigError


def play(seed: int = 0, chunks: int = 4, total_ms: float = 100) -> PlayedCase:
    random = np.random.default_rng(seed)
    return PlayedCase(
        [
            PlayedChunk(
                random.integers(0, 255, (9 if i == 0 else 12, 16, 24, 3), np.uint8),
                {"chunk_total_ms": total_ms + i, "dit_ms": 50, "ws_payload_bytes": 1000},
            )
            for i in range(chunks)
        ]
    )


@pytest.fixture
def case() -> Case:
    return Case("noise", 4, {}, keep_every=2)


@pytest.fixture
def gt(case, tmp_path):
    write_truth(tmp_path / "gt", case, play())
    return tmp_path / "gt"


def test_the_same_frames_pass(case, gt):
    """An unchanged build: no problem, no different frame, all key frames exact."""
    exact = dataclasses.replace(case, thresholds=Thresholds(exact=True))
    report = compare(exact, play(), gt)
    assert report.passed
    assert (report.frames, report.different_frames) == (45, 0)
    assert len(report.key_frames) == 6
    assert all(key.mean_abs_diff == 0 for key in report.key_frames)


def test_other_frames_fail_with_their_place(case, gt):
    """A world that differs names chunk, frame and every figure that is out."""
    report = compare(case, play(seed=1), gt)
    assert not report.passed
    assert any(problem.startswith("chunk 0 frame 0: PSNR") for problem in report.problems)
    assert any("SSIM" in problem for problem in report.problems)
    assert any("mean difference" in problem for problem in report.problems)
    assert report.different_frames == 45


def test_one_changed_byte_fails_only_an_exact_case(case, gt):
    """A single grey level passes the thresholds and fails the hashes."""
    played = play()
    played.chunks[3].frames[5, 0, 0, 0] ^= 1
    assert compare(case, played, gt).passed
    exact = dataclasses.replace(case, thresholds=Thresholds(exact=True))
    assert compare(exact, played, gt).problems == ["chunk 3: 1 of 12 frames are not the recorded bytes"]


def test_slower_chunks_fail_the_latency_guard_only(case, gt):
    """Twice the chunk time fails p50 and p95, unless another machine recorded the truth."""
    slow = play(total_ms=200)
    problems = compare(case, slow, gt).problems
    assert [problem.split(",")[0] for problem in problems] == ["p50 of chunk_total_ms 202", "p95 of chunk_total_ms 203"]
    assert compare(case, slow, gt, guard_latency=False).passed


def test_a_chunk_of_another_length_fails(case, gt):
    """Frame counts are compared before pictures are."""
    assert compare(case, play(chunks=3), gt).problems[0].startswith("frames a chunk [9, 12, 12], recorded")


def test_missing_and_damaged_truth_are_errors(case, gt):
    """No truth, or one that cannot be read, is not a pass."""
    with pytest.raises(ConfigError, match="check record"):
        read_truth(gt, dataclasses.replace(case, name="other"))
    (gt / "noise" / "truth.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        read_truth(gt, case)


def test_the_report_shows_what_differs(case, gt, tmp_path):
    """Table, JSON and page agree; a failed case has pictures of true, got and difference."""
    reports = [compare(case, play(seed=1), gt), compare(case, play(), gt)]
    index = write_report(tmp_path / "report", reports)
    written = json.loads((index.parent / "report.json").read_text())
    assert written == as_json(reports)
    assert [entry["passed"] for entry in written["cases"]] == [False, True]
    assert written["cases"][1]["key_frames"][0]["psnr"] is None
    pictures = list(index.parent.glob("*.png"))
    assert len(pictures) == 6
    with Image.open(pictures[0]) as picture:
        assert picture.size == (72, 16)
    assert "FAILED" in table(reports)
    assert index.read_text().count("<img") == 6
