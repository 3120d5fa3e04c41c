"""Strong scaling: compares reports of the same chunks on different numbers of ranks, and computes those of more."""

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
    exchange_share: float  # part of the chunk that rank 0 waits for others, transfers outside of kernels included


COMPUTED_RANKS = (4, 8)
"""Numbers of ranks whose chunk is computed from the first two measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A chunk on some number of ranks: median milliseconds in all, and of them in collectives."""

    ranks: int
    total_ms: float
    exchange_ms: float


def computed_ms(fewer: Measured, more: Measured, ranks: int) -> float:
    """Milliseconds of a chunk on N = ``ranks`` ranks: a / N + b + e (N - 1) / N^2.

    Each measured chunk without its exchanges is a / N + b, which gives a and b: b is what is not split, such as a
    decode on rank 0, and what kernels write into other GPUs' memory. A rank keeps 1 / N of its 1 / N of the data and
    sends the rest, which gives e. Waits for the slowest of more ranks are left out, and columns decoded twice.
    """
    split = (_alone_ms(fewer) - _alone_ms(more)) / (1 / fewer.ranks - 1 / more.ranks)
    rest = max(0.0, _alone_ms(more) - split / more.ranks)
    return split / ranks + rest + more.exchange_ms * _sent(ranks) / _sent(more.ranks)


def _alone_ms(measured: Measured) -> float:
    return measured.total_ms - measured.exchange_ms


def _sent(ranks: int) -> float:
    return (ranks - 1) / ranks**2


@dataclass(frozen=True, slots=True)
class Comparison:
    """All reports of one run on one machine."""

    scaling: list[Scaling]
    reports: list[PipelineReport]
    computed_ms: dict[int, float]  # a chunk by number of ranks, from the first two reports

    @classmethod
    def of(cls, reports: list[PipelineReport]) -> Comparison:
        rows = [_against(reports[0], report) for report in reports]
        first, second = (Measured(row.ranks, row.total_ms, row.total_ms * row.exchange_share) for row in rows[:2])
        computed = {ranks: computed_ms(first, second, ranks) for ranks in COMPUTED_RANKS if ranks > second.ranks}
        return cls(rows, reports, computed)


def as_text(comparison: Comparison) -> str:
    rows = comparison.scaling
    base, second = rows[0].ranks, rows[1].ranks
    computed = ", ".join(f"{number(ms)} ms on {ranks}" for ranks, ms in comparison.computed_ms.items())
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
    ) + (
        f"\nx: speedup over {base} rank{'s' * (base > 1)} in this run; medians"
        + f"\ncomputed from {base} and {second} ranks, total: {computed}" * bool(computed)
    )


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
