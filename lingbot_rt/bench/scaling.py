"""Strong scaling: compares reports of the same chunks on different numbers of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from lingbot_rt.bench.figures import number, table
from lingbot_rt.bench.pipeline_report import PipelineReport


@dataclass(frozen=True, slots=True)
class Scaling:
    """One number of ranks compared with the first one measured. All times are medians."""

    ranks: int
    dit_ms: float
    vae_ms: float
    total_ms: float
    frames_per_s: float
    dit_speedup: float
    efficiency: float  # DiT speedup / (ranks / ranks of the first report)
    speedup: float  # of the whole chunk
    exchange_share: float  # part of the chunk that rank 0 spends in collectives, waits for slower ranks included


@dataclass(frozen=True, slots=True)
class Comparison:
    """All reports of one run on one machine."""

    scaling: list[Scaling]
    reports: list[PipelineReport]

    @classmethod
    def of(cls, reports: list[PipelineReport]) -> Comparison:
        return cls([_against(reports[0], report) for report in reports], reports)


def as_text(comparison: Comparison) -> str:
    rows = comparison.scaling
    base = rows[0].ranks
    head = ("ranks", "DiT ms", "VAE ms", "total ms", "frames/s", "DiT x", "efficiency", "total x", "collectives")
    return table(
        head,
        [
            [
                str(row.ranks),
                number(row.dit_ms),
                number(row.vae_ms),
                number(row.total_ms),
                number(row.frames_per_s, 2),
                number(row.dit_speedup, 2),
                f"{100 * row.efficiency:.0f} %",
                number(row.speedup, 2),
                f"{100 * row.exchange_share:.1f} %",
            ]
            for row in rows
        ],
    ) + (f"\nx: speedup over {base} rank{'s' * (base > 1)} in this run; medians")


def _against(first: PipelineReport, report: PipelineReport) -> Scaling:
    def speedup(stage: str) -> float:
        return first.stages_ms[stage].p50 / report.stages_ms[stage].p50

    stages = report.stages_ms
    exchange_ms = stages["exchange"].p50 if "exchange" in stages else 0.0
    return Scaling(
        ranks=report.setting.ranks,
        dit_ms=stages["DiT"].p50,
        vae_ms=stages["VAE"].p50,
        total_ms=stages["total"].p50,
        frames_per_s=report.frames_per_s,
        dit_speedup=speedup("DiT"),
        efficiency=speedup("DiT") * first.setting.ranks / report.setting.ranks,
        speedup=speedup("total"),
        exchange_share=exchange_ms / stages["total"].p50,
    )
