"""Compares one case's frames, times and sizes with its ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lingbot_rt.regression.cases import Case
from lingbot_rt.regression.ground_truth import Figures, frame_hash, key_indices, read_ground_truth, read_key_frame
from lingbot_rt.regression.metrics import mean_abs_diff, psnr, ssim
from lingbot_rt.regression.session_runner import ChunkOutput, Origin

WORST_SHOWN = 6
"""Key frames per case that the report shows, worst first."""


@dataclass(frozen=True, slots=True)
class KeyFrame:
    """The comparison of one key frame with the recorded one."""

    chunk: int
    index: int
    psnr: float
    ssim: float
    mean_abs_diff: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A key frame that differs, with both pictures."""

    key: KeyFrame
    recorded: npt.NDArray[np.uint8]
    got: npt.NDArray[np.uint8]


@dataclass(slots=True)
class CaseReport:
    """The result of one case. It passes if ``problems`` is empty."""

    name: str
    recorded_origin: Origin
    problems: list[str] = field(default_factory=list)
    key_frames: list[KeyFrame] = field(default_factory=list)
    shown: list[Difference] = field(default_factory=list)  # the worst ones, worst first
    chunks: int = 0
    frames: int = 0
    different_frames: int = 0
    origin: Origin | None = None  # set when the case is finished
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)  # compared ones: (now, recorded)

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> KeyFrame | None:
        return min(self.key_frames, key=lambda frame: frame.psnr, default=None)


class CaseCheck:
    """Takes a case's chunks in order. ``check_latency``: also compare times and sizes, if the origins are equal.

    Raises ConfigError if ``folder`` has no ground truth of the case.
    """

    def __init__(self, case: Case, folder: Path, *, check_latency: bool = True) -> None:
        self._case = case
        self._folder = folder
        self._ground_truth = read_ground_truth(folder, case)
        self._figures = Figures(case.ignore_initial_chunks)
        self._checks_latency = check_latency
        self._inexact: list[str] = []
        self._report = CaseReport(case.name, self._ground_truth.origin)

    def add(self, chunk: ChunkOutput) -> None:
        report, number = self._report, self._report.chunks
        report.chunks += 1
        self._figures.add(chunk.stats)
        if number >= len(self._ground_truth.hashes):
            return
        hashes, event_id = self._ground_truth.hashes[number], self._ground_truth.event_ids[number]
        if chunk.event_id != event_id:
            report.problems.append(f"chunk {number}: event id {chunk.event_id}, recorded {event_id}")
        if len(chunk.frames) != len(hashes):
            report.problems.append(f"chunk {number}: {len(chunk.frames)} frames, recorded {len(hashes)}")
            return
        different = sum(frame_hash(frame) != known for frame, known in zip(chunk.frames, hashes, strict=True))
        report.frames += len(hashes)
        report.different_frames += different
        if different:
            self._inexact.append(f"chunk {number}: {different} of {len(hashes)} frames differ from the recorded bytes")
        for index in key_indices(self._case, number, len(hashes)):
            self._compare_key_frame(number, index, chunk.frames[index])

    def finish(self, origin: Origin) -> CaseReport:
        report, recorded = self._report, len(self._ground_truth.hashes)
        report.origin = origin
        if report.chunks != recorded:
            report.problems.append(f"{report.chunks} chunks, recorded {recorded}")
        if self._case.thresholds.exact and origin.expects_same_bytes(self._ground_truth.origin):
            report.problems.extend(self._inexact)
        if self._checks_latency and origin == self._ground_truth.origin:
            self._compare_figures()
        return report

    def _compare_key_frame(self, number: int, index: int, got: npt.NDArray[np.uint8]) -> None:
        limits, report = self._case.thresholds, self._report
        where = f"chunk {number} frame {index}"
        recorded = read_key_frame(self._folder, self._case, number, index)
        if got.shape != recorded.shape:
            report.problems.append(f"{where}: {got.shape}, recorded {recorded.shape}")
            return
        key = KeyFrame(number, index, psnr(got, recorded), ssim(got, recorded), mean_abs_diff(got, recorded))
        report.key_frames.append(key)
        if key.psnr < limits.min_psnr:
            report.problems.append(f"{where}: PSNR {key.psnr:.1f} dB < {limits.min_psnr}")
        if key.ssim < limits.min_ssim:
            report.problems.append(f"{where}: SSIM {key.ssim:.4f} < {limits.min_ssim}")
        if key.mean_abs_diff > limits.max_mean_abs_diff:
            report.problems.append(f"{where}: mean difference {key.mean_abs_diff:.2f} > {limits.max_mean_abs_diff}")
        if key.mean_abs_diff > 0:
            shown = [*report.shown, Difference(key, recorded, got)]
            report.shown = sorted(shown, key=lambda each: each.key.psnr)[:WORST_SHOWN]

    def _compare_figures(self) -> None:
        limits, report = self._case.thresholds, self._report
        for name, now in self._figures.summary().items():
            before = self._ground_truth.figures[name]
            report.figures[name] = (now, before)
            limit = limits.max_payload_growth if name.endswith("payload_mb") else limits.max_latency_growth
            if now > before * limit:
                report.problems.append(f"{name} {now:.3g}, recorded {before:.3g}, at most x{limit:g}")
