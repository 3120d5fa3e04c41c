"""The comparison with ground truth: equal bytes pass, and each kind of difference is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from lingbot_rt.errors import ConfigError
from lingbot_rt.regression.cases import Case, Thresholds
from lingbot_rt.regression.check import WORST_SHOWN, CaseCheck, CaseReport
from lingbot_rt.regression.ground_truth import Figures, GroundTruthWriter, read_ground_truth
from lingbot_rt.regression.report import as_json, table, write_report
from lingbot_rt.regression.session_runner import ChunkOutput, Origin

HERE = Origin("over the wire", "noise", "cpu", "float32")


def chunks_of(seed: int = 0, chunks: int = 4, total_ms: float = 100) -> list[ChunkOutput]:
    random = np.random.default_rng(seed)
    return [
        ChunkOutput(
            random.integers(0, 255, (9 if i == 0 else 12, 16, 24, 3), np.uint8),
            {"chunk_total_ms": total_ms + i, "dit_ms": 50, "ws_payload_bytes": 2**20},
            event_id=None,
        )
        for i in range(chunks)
    ]


def check(case, chunks, gt, *, origin=HERE, check_latency=True) -> CaseReport:
    case_check = CaseCheck(case, gt, check_latency=check_latency)
    for chunk in chunks:
        case_check.add(chunk)
    return case_check.finish(origin)


@pytest.fixture
def case() -> Case:
    return Case("noise", 4, {}, keep_every=2, ignore_initial_chunks=2)


@pytest.fixture
def gt(case, tmp_path):
    writer = GroundTruthWriter(tmp_path / "gt", case)
    for chunk in chunks_of():
        writer.add(chunk)
    writer.finish(HERE)
    return tmp_path / "gt"


def test_the_same_frames_pass(case, gt):
    """An unchanged build has no problems, no different frames and nothing to show."""
    exact = replace(case, thresholds=Thresholds(exact=True))
    report = check(exact, chunks_of(), gt)
    assert report.passed
    assert (report.frames, report.different_frames) == (45, 0)
    assert len(report.key_frames) == 6
    assert all(key.mean_abs_diff == 0 for key in report.key_frames)
    assert report.shown == []


def test_other_frames_fail_with_their_place(case, gt):
    """Different frames are reported with chunk, frame and every figure beyond its limit."""
    report = check(case, chunks_of(seed=1), gt)
    assert not report.passed
    assert any(problem.startswith("chunk 0 frame 0: PSNR") for problem in report.problems)
    assert any("SSIM" in problem for problem in report.problems)
    assert any("mean difference" in problem for problem in report.problems)
    assert report.different_frames == 45


def test_one_changed_byte_fails_only_an_exact_case(case, gt):
    """One grey level of difference passes the thresholds and fails the hashes, unless another device made them."""
    chunks = chunks_of()
    chunks[3].frames[5, 0, 0, 0] ^= 1
    assert check(case, chunks, gt).passed
    exact = replace(case, thresholds=Thresholds(exact=True))
    assert check(exact, chunks, gt).problems == ["chunk 3: 1 of 12 frames differ from the recorded bytes"]
    in_process = Origin("in process", "noise", "cpu", "float32")
    assert not check(exact, chunks, gt, origin=in_process).passed
    another_device = Origin("over the wire", "noise", "cuda", "float32")
    assert check(exact, chunks, gt, origin=another_device).passed


def test_an_event_in_another_chunk_fails(case, gt):
    """The event id of each chunk is compared too."""
    chunks = chunks_of()
    chunks[1] = ChunkOutput(chunks[1].frames, chunks[1].stats, event_id=3)
    assert check(case, chunks, gt).problems == ["chunk 1: event id 3, recorded None"]


def test_slower_chunks_fail_the_latency_check_only(case, gt):
    """Twice the chunk time fails p50 and p95. It is not compared with ground truth of another origin."""
    slow = chunks_of(total_ms=200)
    names = [problem.split()[0] for problem in check(case, slow, gt).problems]
    assert names == ["p50_chunk_total_ms", "p95_chunk_total_ms"]
    assert check(case, slow, gt, check_latency=False).passed
    elsewhere = check(case, slow, gt, origin=Origin("in process", "noise", "cpu", "float32"))
    assert elsewhere.passed
    assert elsewhere.figures == {}
    assert "not compared" in table([elsewhere])


def test_larger_messages_fail_the_payload_check(case, gt):
    """20 % more bytes on the wire fail, since 10 % are allowed."""
    larger = [ChunkOutput(c.frames, c.stats | {"ws_payload_bytes": 1.2 * 2**20}, c.event_id) for c in chunks_of()]
    assert check(case, larger, gt).problems[0] == "p50_ws_payload_mb 1.2, recorded 1, at most x1.1"


def test_figures_leave_the_first_chunks_out():
    """Median and 95th percentile, as existing clients compute it, of the chunks after the first ones."""
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
    """Missing chunks, extra chunks and a chunk of another length are reported."""
    assert check(case, chunks_of(chunks=3), gt).problems == ["3 chunks, recorded 4"]
    assert "5 chunks, recorded 4" in check(case, chunks_of(chunks=5), gt).problems
    short = chunks_of()
    short[2] = ChunkOutput(short[2].frames[:11], short[2].stats, None)
    assert check(case, short, gt).problems == ["chunk 2: 11 frames, recorded 12"]


def test_missing_and_damaged_ground_truth_are_errors(case, gt):
    """Missing ground truth, a missing picture and a damaged truth.json raise ConfigError."""
    with pytest.raises(ConfigError, match="check record"):
        read_ground_truth(gt, replace(case, name="other"))
    with pytest.raises(ConfigError, match=r"chunk0001_frame00\.png: .*check record"):
        check(replace(case, keep_every=1), chunks_of(), gt)
    (gt / "noise" / "truth.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        read_ground_truth(gt, case)


def test_the_report_shows_what_differs(case, gt, tmp_path):
    """Table, JSON and page agree. A failed case has pictures of the recorded frame, the new one and the difference."""
    reports = [check(case, chunks_of(seed=1), gt), check(case, chunks_of(), gt)]
    index = write_report(tmp_path / "report", reports)
    written = json.loads((index.parent / "report.json").read_text())
    assert written == as_json(reports)
    assert [entry["passed"] for entry in written["cases"]] == [False, True]
    assert written["cases"][1]["key_frames"][0]["psnr"] is None
    pictures = list(index.parent.glob("*.png"))
    assert len(pictures) == WORST_SHOWN
    with Image.open(pictures[0]) as picture:
        assert picture.size == (72, 16)
    assert "FAILED" in table(reports)
    assert index.read_text().count("<img") == WORST_SHOWN
