"""What a person sees of a guard run: a table, and a page with the pictures that differ; and JSON for machines."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lingbot_rt.consistency.guard import CaseReport, KeyFrame

_PICTURES_A_CASE = 6
_AMPLIFY = 8
_PAGE = (
    "<!doctype html><meta charset=utf-8><title>Consistency</title>"
    "<style>body{font:14px system-ui;margin:2em}img{max-width:100%}</style>"
)


def table(reports: list[CaseReport]) -> str:
    """One line a case: verdict, frames that differ, worst key frame, latency against the recorded one."""
    lines = [
        f"{'case':<24} {'verdict':<8} {'frames':>7} {'differ':>7} {'PSNR':>8} {'SSIM':>7} {'diff':>6}  "
        "p50 ms (recorded)"
    ]
    for report in reports:
        worst = report.worst
        psnr = "-" if worst is None else "exact" if math.isinf(worst.psnr) else f"{worst.psnr:.1f}"
        ssim = "-" if worst is None else f"{worst.ssim:.4f}"
        diff = "-" if worst is None else f"{worst.mean_abs_diff:.2f}"
        times = report.figures.get("chunk_total_ms")
        latency = "" if times is None else f"{times[0].p50:.0f} ({times[1].p50:.0f})"
        verdict = "ok" if report.passed else "FAILED"
        lines.append(
            f"{report.name:<24} {verdict:<8} {report.frames:>7} {report.different_frames:>7} "
            f"{psnr:>8} {ssim:>7} {diff:>6}  {latency}"
        )
        lines.extend(f"    {problem}" for problem in report.problems)
    return "\n".join(lines)


def as_json(reports: list[CaseReport]) -> dict[str, Any]:
    """Everything but the pictures. An exact frame's PSNR is null: JSON has no infinity."""

    def frame(key: KeyFrame) -> dict[str, Any]:
        values = {"chunk": key.chunk, "index": key.index, "ssim": key.ssim, "mean_abs_diff": key.mean_abs_diff}
        return values | {"psnr": None if math.isinf(key.psnr) else key.psnr}

    return {
        "passed": all(report.passed for report in reports),
        "cases": [
            {
                "name": report.name,
                "passed": report.passed,
                "problems": report.problems,
                "frames": report.frames,
                "different_frames": report.different_frames,
                "key_frames": [frame(key) for key in report.key_frames],
                "figures": {
                    name: {"p50": now.p50, "p95": now.p95, "recorded_p50": then.p50, "recorded_p95": then.p95}
                    for name, (now, then) in report.figures.items()
                },
            }
            for report in reports
        ],
    }


def write_report(folder: Path, reports: list[CaseReport]) -> Path:
    """report.json, index.html and a picture (true, got, difference x8) for the worst key frames of each failed case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(as_json(reports), indent=1) + "\n", encoding="utf-8")
    parts = [f"<pre>{html.escape(table(reports))}</pre>"]
    for report in reports:
        if report.passed:
            continue
        parts.append(f"<h2>{html.escape(report.name)}</h2><p>true, got, difference x{_AMPLIFY}</p>")
        for key in sorted(report.key_frames, key=lambda key: key.psnr)[:_PICTURES_A_CASE]:
            name = f"{report.name}_chunk{key.chunk:04d}_frame{key.index:02d}.png"
            Image.fromarray(triptych(key)).save(folder / name)
            caption = f"chunk {key.chunk} frame {key.index}: {key.psnr:.1f} dB"
            parts.append(f'<figure><img src="{name}"><figcaption>{caption}</figcaption></figure>')
    index = folder / "index.html"
    index.write_text(_PAGE + "\n".join(parts), encoding="utf-8")
    return index


def triptych(key: KeyFrame) -> np.ndarray:
    """uint8 [H, 3 W, 3]: the recorded frame, the frame got, and their amplified difference."""
    difference = np.abs(key.got.astype(np.int16) - key.true) * _AMPLIFY
    return np.concatenate([key.true, key.got, difference.clip(0, 255).astype(np.uint8)], axis=1)
