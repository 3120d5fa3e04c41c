"""Compares a played case with its ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lingbot_rt.consistency.cases import Case
from lingbot_rt.consistency.ground_truth import (
    PlayedCase,
    Spread,
    Truth,
    figures,
    frame_hash,
    key_indices,
    read_key_frame,
    read_truth,
)
from lingbot_rt.consistency.metrics import mean_abs_diff, psnr, ssim


@dataclass(frozen=True, slots=True)
class KeyFrame:
    """One key frame that was compared, with both pictures for the report."""

    chunk: int
    index: int
    psnr: float
    ssim: float
    mean_abs_diff: float
    got: npt.NDArray[np.uint8]
    true: npt.NDArray[np.uint8]


@dataclass(slots=True)
class CaseReport:
    """The verdict on one case; it passes when ``problems`` is empty."""

    name: str
    problems: list[str] = field(default_factory=list)
    key_frames: list[KeyFrame] = field(default_factory=list)
    frames: int = 0
    different_frames: int = 0
    figures: dict[str, tuple[Spread, Spread]] = field(default_factory=dict)  # (now, recorded)

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> KeyFrame | None:
        return min(self.key_frames, key=lambda frame: frame.psnr, default=None)


def compare(case: Case, played: PlayedCase, gt: Path, *, guard_latency: bool = True) -> CaseReport:
    """``played`` against the truth in ``gt``. ``guard_latency`` is for the machine that recorded it.

    Raises ConfigError when there is no truth of the case.
    """
    truth = read_truth(gt, case)
    report = CaseReport(case.name)
    lengths = [len(chunk.frames) for chunk in played.chunks]
    expected = [len(hashes) for hashes in truth.hashes]
    if lengths != expected:
        report.problems.append(f"frames a chunk {lengths}, recorded {expected}")
        return report
    _compare_hashes(case, played, truth, report)
    _compare_key_frames(case, played, gt, report)
    if guard_latency:
        _compare_figures(case, played, truth, report)
    return report


def _compare_hashes(case: Case, played: PlayedCase, truth: Truth, report: CaseReport) -> None:
    for number, (chunk, hashes) in enumerate(zip(played.chunks, truth.hashes, strict=True)):
        different = sum(frame_hash(frame) != known for frame, known in zip(chunk.frames, hashes, strict=True))
        report.frames += len(hashes)
        report.different_frames += different
        if different and case.thresholds.exact:
            report.problems.append(f"chunk {number}: {different} of {len(hashes)} frames are not the recorded bytes")


def _compare_key_frames(case: Case, played: PlayedCase, gt: Path, report: CaseReport) -> None:
    limits = case.thresholds
    for number, chunk in enumerate(played.chunks):
        if number % case.keep_every:
            continue
        for index in key_indices(len(chunk.frames)):
            got, true = chunk.frames[index], read_key_frame(gt, case, number, index)
            if got.shape != true.shape:
                report.problems.append(f"chunk {number} frame {index}: {got.shape}, recorded {true.shape}")
                continue
            frame = KeyFrame(number, index, psnr(got, true), ssim(got, true), mean_abs_diff(got, true), got, true)
            report.key_frames.append(frame)
            where = f"chunk {number} frame {index}"
            if frame.psnr < limits.min_psnr:
                report.problems.append(f"{where}: PSNR {frame.psnr:.1f} dB < {limits.min_psnr}")
            if frame.ssim < limits.min_ssim:
                report.problems.append(f"{where}: SSIM {frame.ssim:.4f} < {limits.min_ssim}")
            if frame.mean_abs_diff > limits.max_mean_abs_diff:
                report.problems.append(
                    f"{where}: mean difference {frame.mean_abs_diff:.2f} > {limits.max_mean_abs_diff}"
                )


def _compare_figures(case: Case, played: PlayedCase, truth: Truth, report: CaseReport) -> None:
    for name, now in figures(case, played).items():
        recorded = truth.figures.get(name)
        if recorded is None:
            continue
        report.figures[name] = (now, recorded)
        is_bytes = name == "ws_payload_bytes"
        limit = case.thresholds.max_payload_growth if is_bytes else case.thresholds.max_latency_growth
        for part in ("p50", "p95"):
            got, before = getattr(now, part), getattr(recorded, part)
            if got > before * limit:
                report.problems.append(f"{part} of {name} {got:.0f}, recorded {before:.0f}, at most x{limit}")
