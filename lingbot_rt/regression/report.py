"""Reports of `check run`: a table, JSON, and an HTML page with the frames that differ."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.regression.check import CaseReport, Difference, KeyFrame

_PAGE = (
    "<!doctype html><meta charset=utf-8><title>Regression check</title>"
    "<style>body{font:14px system-ui;margin:2em}img{max-width:100%}</style>"
)


def table(reports: list[CaseReport]) -> str:
    """One line per case: verdict, frames that differ, worst key frame, chunk time beside the recorded one."""
    lines = [
        f"{'case':<24} {'verdict':<8} {'frames':>7} {'differ':>7} {'PSNR':>8} {'SSIM':>7} {'diff':>6}  "
        "p50 chunk ms (recorded)"
    ]
    for report in reports:
        worst = report.worst
        psnr = "-" if worst is None else "exact" if math.isinf(worst.psnr) else f"{worst.psnr:.1f}"
        ssim = "-" if worst is None else f"{worst.ssim:.4f}"
        diff = "-" if worst is None else f"{worst.mean_abs_diff:.2f}"
        times = report.figures.get("p50_chunk_total_ms")
        latency = "not compared" if times is None else f"{times[0]:.0f} ({times[1]:.0f})"
        verdict = "ok" if report.passed else "FAILED"
        lines.append(
            f"{report.name:<24} {verdict:<8} {report.frames:>7} {report.different_frames:>7} "
            f"{psnr:>8} {ssim:>7} {diff:>6}  {latency}"
        )
        lines.extend(f"    {problem}" for problem in report.problems)
    lines.extend(sorted({f"run: {report.origin}; recorded: {report.recorded_origin}" for report in reports}))
    return "\n".join(lines)


def as_json(reports: list[CaseReport]) -> dict[str, Any]:
    """The whole report except pictures. An exact frame's PSNR is null, because JSON has no infinity."""

    def frame(key: KeyFrame) -> dict[str, Any]:
        return asdict(key) | {"psnr": None if math.isinf(key.psnr) else key.psnr}

    return {
        "passed": all(report.passed for report in reports),
        "cases": [
            {
                "name": report.name,
                "passed": report.passed,
                "problems": report.problems,
                "origin": None if report.origin is None else asdict(report.origin),
                "recorded_origin": asdict(report.recorded_origin),
                "num_chunks": report.chunks,
                "total_frames": report.frames,
                "different_frames": report.different_frames,
                "key_frames": [frame(key) for key in report.key_frames],
                "figures": {name: now for name, (now, _) in report.figures.items()},
                "recorded_figures": {name: before for name, (_, before) in report.figures.items()},
            }
            for report in reports
        ],
    }


def write_report(folder: Path, reports: list[CaseReport]) -> Path:
    """Writes report.json, index.html and a picture (recorded, new, difference) of each case's worst key frames.

    Returns the path of index.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(as_json(reports), indent=1) + "\n", encoding="utf-8")
    parts = [f"<pre>{html.escape(table(reports))}</pre>"]
    for report in reports:
        if report.shown:
            parts.append(f"<h2>{html.escape(report.name)}</h2><p>recorded, new, difference (brightened)</p>")
        for difference in report.shown:
            key = difference.key
            name = f"{report.name}_chunk{key.chunk:04d}_frame{key.index:02d}.png"
            Image.fromarray(triptych(difference)).save(folder / name)
            caption = f"chunk {key.chunk} frame {key.index}: {key.psnr:.1f} dB, SSIM {key.ssim:.4f}"
            parts.append(f'<figure><img src="{name}"><figcaption>{caption}</figcaption></figure>')
    index = folder / "index.html"
    index.write_text(_PAGE + "\n".join(parts), encoding="utf-8")
    return index


def triptych(difference: Difference) -> npt.NDArray[np.uint8]:
    """uint8 [H, 3 W, 3]: recorded frame, new frame, and their difference scaled so that its maximum is 255."""
    absolute = np.abs(difference.got.astype(np.int16) - difference.recorded)
    bright = (absolute * (255 / max(absolute.max(), 1))).astype(np.uint8)
    return np.concatenate([difference.recorded, difference.got, bright], axis=1)
