"""``bench pipeline --interactive-kv-window``: what a chunk takes that sees the whole window, and one that sees less.

All of them run in one session in turn, so that whatever else the machine does slows all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lingbot_rt.bench.figures import Spread, number, table
from lingbot_rt.bench.pipeline import (
    Run,
    SyntheticSession,
    TimedChunk,
    Workload,
    peak_memory_gb,
    reset_peak_memory,
)
from lingbot_rt.bench.pipeline_report import Setting, setting_of
from lingbot_rt.engine.compilation import tuned_convolutions
from lingbot_rt.engine.memory import GB, require_room
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.errors import ConfigError
from lingbot_rt.parallel.coordinator import Coordinator
from lingbot_rt.session.interactive_window import recent_frames


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """One case. All times are milliseconds per chunk."""

    case: str
    visible_frames: int  # latent frames that each chunk attended to
    dit_ms: Spread
    total_ms: Spread
    frames_per_s: float
    dit_speedup: float  # of the medians, over the whole window
    speedup: float


@dataclass(frozen=True, slots=True)
class WindowsReport:
    setting: Setting
    cases: list[WindowFigures]


def interactive_cases(pipeline: Pipeline, workload: Workload) -> dict[str, int | None]:
    """Name -> latent frames before a chunk that it sees. Raises ConfigError for a window in which nothing differs."""
    plan = workload.session_plan(pipeline)
    still, moving = recent_frames(plan.sink_frames, plan.window_frames, plan.latent_frames)
    beside = plan.sink_frames + plan.latent_frames
    if still + beside == plan.window_frames:
        raise ConfigError(
            f"--window {plan.window_frames}: the interactive window of a sink of {plan.sink_frames} sees all of it; "
            f"expected more than {still + beside}",
            field="window",
        )
    return {"whole window": None, "camera moves": moving, "camera at rest": still}


def measure_windows(
    pipeline: Pipeline, workload: Workload, weights: str, on_chunk: Callable[[], object], coordinator: Coordinator
) -> WindowsReport:
    """``workload.chunks`` chunks of each case, in turn, once the window is full. ``on_chunk`` is called after each.

    Before them one of each narrow case runs unmeasured. Raises ConfigError for an impossible workload, CapacityError
    if its session does not fit in memory.
    """
    cases = interactive_cases(pipeline, workload)
    levels = tuple(recent for recent in cases.values() if recent is not None)
    plan = replace(workload.session_plan(pipeline), recent_frames=levels)
    planned = require_room(pipeline, plan, coordinator)
    session = SyntheticSession(pipeline, plan, coordinator)
    with tuned_convolutions():
        for recent in [None] * workload.warm_chunks(plan) + list(levels):
            session.step(recent)
            on_chunk()
    reset_peak_memory(pipeline.device)
    timed: dict[str, list[TimedChunk]] = {case: [] for case in cases}
    for _ in range(workload.chunks):
        for case, recent in cases.items():
            timed[case].append(session.step(recent))
            on_chunk()
    session.close()
    chunks = [chunk for each in timed.values() for chunk in each]
    run = Run(workload, plan, chunks, planned.total_bytes / GB, peak_memory_gb(pipeline.device))
    whole = timed["whole window"]
    return WindowsReport(
        setting_of(pipeline, weights, run), [_figures(case, chunks, whole) for case, chunks in timed.items()]
    )


def _figures(case: str, chunks: list[TimedChunk], whole: list[TimedChunk]) -> WindowFigures:
    def spread(of: list[TimedChunk], stage: str) -> Spread:
        return Spread.of([chunk.stages()[stage] for chunk in of])

    dit, total = spread(chunks, "DiT"), spread(chunks, "total")
    frames = sum(chunk.result.num_frames for chunk in chunks)
    return WindowFigures(
        case=case,
        visible_frames=chunks[-1].result.window_frames,
        dit_ms=dit,
        total_ms=total,
        frames_per_s=1000 * frames / (total.mean * total.count),
        dit_speedup=spread(whole, "DiT").p50 / dit.p50,
        speedup=spread(whole, "total").p50 / total.p50,
    )


def as_text(report: WindowsReport) -> str:
    head = ("per chunk", "visible", "DiT p50 ms", "p95 ms", "total p50 ms", "p95 ms", "frames/s", "DiT x", "total x")
    rows = [
        [
            each.case,
            str(each.visible_frames),
            number(each.dit_ms.p50),
            number(each.dit_ms.p95),
            number(each.total_ms.p50),
            number(each.total_ms.p95),
            number(each.frames_per_s, 2),
            number(each.dit_speedup, 2),
            number(each.speedup, 2),
        ]
        for each in report.cases
    ]
    return (
        f"{report.setting}\n\n{table(head, rows)}\nx: speedup over the whole window, of medians; the cases ran in turn"
    )
