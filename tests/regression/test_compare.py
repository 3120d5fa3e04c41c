"""The verdict on played cases: passes on equal bytes, names each way to differ."""

from __future__ import annotations

import json

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from lingbot_rt.errors import ConfigError
from lingbot_rt.regression.cases import Case, Thresholds
from lingbot_rt.regression.compare import SHOWN, CaseReport, Comparison
from lingbot_rt.regression.ground_truth import Figures, TruthWriter, read_truth
from lingbot_rt.regression.play import Origin, PlayedChunk
from lingbot_rt.regression.report import as_json, table, write_report

HERE = Origin("over the wire", "noise", "cpu", "float32")


def play(seed: int = 0, chunks: int = 4, total_ms: float = 100) -> list[PlayedChunk]:
    random = np.random.default_rng(seed)
    return [
        PlayedChunk(
            random.integers(0, 255, (9 if i == 0 else 12, 16, 24, 3), np.uint8),
            {"chunk_total_ms": total_ms + i, "dit_ms": 50, "ws_payload_bytes": 2**20},
            event_id=None,
        )
        for i in range(chunks)
    ]


def compare(case, played, gt, *, origin=HERE, guard_latency=True) -> CaseReport:
    comparison = Comparison(case, gt, guard_latency=guard_latency)
    for chunk in played:
        comparison.add(chunk)
    return comparison.finish(origin)


@pytest.fixture
def case() -> Case:
    return Case("noise", 4, {}, keep_every=2, ignore_initial_chunks=2)


@pytest.fixture
def gt(case, tmp_path):
    writer = TruthWriter(tmp_path / "gt", case)
    for chunk in play():
        writer.add(chunk)
    writer.finish(HERE)
    return tmp_path / "gt"


def test_the_same_frames_pass(case, gt):
    """An unchanged build: no problem, no different frame, all key frames exact, nothing to show."""
    exact = replace(case, thresholds=Thresholds(exact=True))
    report = compare(exact, play(), gt)
    assert report.passed
    assert (report.frames, report.different_frames) == (45, 0)
    assert len(report.key_frames) == 6
    assert all(key.mean_abs_diff == 0 for key in report.key_frames)
    assert report.shown == []


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
    played[3].frames[5, 0, 0, 0] ^= 1
    assert compare(case, played, gt).passed
    exact = replace(case, thresholds=Thresholds(exact=True))
    assert compare(exact, played, gt).problems == ["chunk 3: 1 of 12 frames are not the recorded bytes"]
    in_process = Origin("in process", "noise", "cpu", "float32")
    assert not compare(exact, played, gt, origin=in_process).passed
    another_device = Origin("over the wire", "noise", "cuda", "float32")
    assert compare(exact, played, gt, origin=another_device).passed


def test_an_event_that_comes_into_force_elsewhere_fails(case, gt):
    """The event id of each chunk is kept as well."""
    played = play()
    played[1] = PlayedChunk(played[1].frames, played[1].stats, event_id=3)
    assert compare(case, played, gt).problems == ["chunk 1: event id 3, recorded None"]


def test_slower_chunks_fail_the_latency_guard_only(case, gt):
    """Twice the chunk time fails p50 and p95, unless another machine, or another way, made the truth."""
    slow = play(total_ms=200)
    names = [problem.split()[0] for problem in compare(case, slow, gt).problems]
    assert names == ["p50_chunk_total_ms", "p95_chunk_total_ms"]
    assert compare(case, slow, gt, guard_latency=False).passed
    elsewhere = compare(case, slow, gt, origin=Origin("in process", "noise", "cpu", "float32"))
    assert elsewhere.passed
    assert elsewhere.figures == {}
    assert "not compared" in table([elsewhere])


def test_larger_messages_fail_the_payload_guard(case, gt):
    """A fifth more bytes on the wire is more than the tenth that is allowed."""
    larger = [PlayedChunk(c.frames, c.stats | {"ws_payload_bytes": 1.2 * 2**20}, c.event_id) for c in play()]
    assert compare(case, larger, gt).problems[0] == "p50_ws_payload_mb 1.2, recorded 1, at most x1.1"


def test_figures_leave_the_first_chunks_out():
    """Median and 95th percentile, as existing clients take it, of the chunks after the first ones."""
    figures = Figures(ignore_initial_chunks=2)
    for ms in (900, 800, *range(1, 101)):
        figures.add({"chunk_total_ms": ms, "dit_ms": ms})
    assert figures.summary() == {
        "p50_chunk_total_ms": 50.5,
        "p95_chunk_total_ms": 96,
        "p50_dit_ms": 50.5,
        "p95_dit_ms": 96,
    }


def test_a_case_of_another_length_fails(case, gt):
    """Chunks that are missing or too many, and a chunk of another length, are named."""
    assert compare(case, play(chunks=3), gt).problems == ["3 chunks, recorded 4"]
    assert "5 chunks, recorded 4" in compare(case, play(chunks=5), gt).problems
    short = play()
    short[2] = PlayedChunk(short[2].frames[:11], short[2].stats, None)
    assert compare(case, short, gt).problems == ["chunk 2: 11 frames, recorded 12"]


def test_missing_and_damaged_truth_are_errors(case, gt):
    """No truth, a picture that is not there, or a truth that cannot be read, is not a pass."""
    with pytest.raises(ConfigError, match="check record"):
        read_truth(gt, replace(case, name="other"))
    with pytest.raises(ConfigError, match=r"chunk0001_frame00\.png: .*check record"):
        compare(replace(case, keep_every=1), play(), gt)
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
    assert len(pictures) == SHOWN
    with Image.open(pictures[0]) as picture:
        assert picture.size == (72, 16)
    assert "FAILED" in table(reports)
    assert index.read_text().count("<img") == SHOWN
