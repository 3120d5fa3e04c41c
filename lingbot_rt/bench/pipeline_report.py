"""The report of ``bench pipeline``: figures of the timed chunks and the setting they were measured in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lingbot_rt.bench.figures import Spread, number, significant, table
from lingbot_rt.bench.flops import ChunkFlops, ChunkShape, Flops, chunk_flops
from lingbot_rt.bench.pipeline import OPENING_CHUNKS, Run
from lingbot_rt.bench.roofline import Roofline
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.session.plan import SessionPlan

_TERA = 1e12


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured, and on which device."""

    model: str
    weights: str  # "random" or "loaded"
    device: str  # of rank 0
    ranks: int
    vae_parallel: str  # none or width
    peer_memory: bool  # GPUs write into each other's memory
    torch: str
    dtype: str
    vae_dtype: str
    quantization: str
    kv_cache_dtype: str  # of the window
    compiled: bool
    attention_backend: str
    size: str
    latent_frames: int
    sink_frames: int
    window_frames: int
    visible_frames: tuple[int, int]  # fewest and most that a measured chunk attended to
    steps: int
    case: str  # "steady", or "chunks 0 to 3"
    warm_chunks: int
    chunks: int  # measured

    def __str__(self) -> str:
        fewest, most = self.visible_frames
        visible = f"{most}" if fewest == most else f"{fewest} to {most}"
        through = "each other's memory" if self.peer_memory else "collectives"
        ranks = f", {self.ranks} ranks (through {through}, VAE parallel: {self.vae_parallel})" if self.ranks > 1 else ""
        return (
            f"{self.model} ({self.weights} weights), {self.device}{ranks}, torch {self.torch}\n"
            f"{self.size}, {self.latent_frames} latent frames per chunk, window {self.window_frames} "
            f"(sink {self.sink_frames}, visible {visible}), {self.steps} steps, DiT {self.dtype} "
            f"(quantization {self.quantization}, window {self.kv_cache_dtype}, "
            f"attention {self.attention_backend}), VAE {self.vae_dtype}, "
            f"{'compiled' if self.compiled else 'not compiled'}\n"
            f"{self.case}: {self.chunks} chunks measured after {self.warm_chunks} warm-up chunks"
        )


@dataclass(frozen=True, slots=True)
class PipelineReport:
    setting: Setting
    stages_ms: dict[str, Spread]
    frames_per_s: float
    tflop: dict[str, float]  # per chunk, mean
    tflop_per_s: dict[str, float]
    roofline_tflop_per_s: Roofline  # of rank 0's device
    roofline_ms: float  # shortest possible DiT time at those rates, with the work split over the ranks
    roofline_share: float  # roofline_ms / measured DiT time
    planned_memory_gb: float  # the server's estimate for the session without the weights, in units of 1e9 bytes
    peak_memory_gb: float | None  # weights included; None on a CPU


def pipeline_report(pipeline: Pipeline, weights: str, run: Run, roofline: Roofline) -> PipelineReport:
    stages = [chunk.stages() for chunk in run.chunks]
    spreads = {name: Spread.of([stage[name] for stage in stages]) for name in stages[0]}
    work = mean_work(pipeline, run.plan, run.visible_frames)
    flops = {"camera": work.camera, "denoise": work.denoise, "context": work.context, "DiT": work.dit}
    mean_ms = {name: spreads[name].mean for name in flops}
    roofline_ms = 1000 * roofline.seconds(work.dit) / pipeline.ranks.world
    frames = sum(chunk.result.num_frames for chunk in run.chunks)
    return PipelineReport(
        setting=setting_of(pipeline, weights, run),
        stages_ms=spreads,
        frames_per_s=1000 * frames / sum(stage["total"] for stage in stages),
        tflop={name: part.total / _TERA for name, part in flops.items()},
        tflop_per_s={name: part.total / _TERA / (mean_ms[name] / 1000) for name, part in flops.items()},
        roofline_tflop_per_s=roofline,
        roofline_ms=roofline_ms,
        roofline_share=roofline_ms / mean_ms["DiT"],
        planned_memory_gb=run.planned_memory_gb,
        peak_memory_gb=run.peak_memory_gb,
    )


def full_shape(plan: SessionPlan) -> ChunkShape:
    """The shape of a chunk of this session once its window is full."""
    return ChunkShape(plan.size, plan.latent_frames, plan.window_frames, plan.num_steps)


def mean_work(pipeline: Pipeline, plan: SessionPlan, visible_frames: Sequence[int]) -> ChunkFlops:
    """Mean operations per chunk; ``visible_frames`` has the latent frames that each chunk attended to."""
    counted = [
        chunk_flops(pipeline.dit.config, ChunkShape(plan.size, plan.latent_frames, visible, plan.num_steps))
        for visible in visible_frames
    ]

    def mean(parts: list[Flops]) -> Flops:
        return sum(parts, Flops()).times(1 / len(parts))

    return ChunkFlops(
        camera=mean([chunk.camera for chunk in counted]),
        denoise=mean([chunk.denoise for chunk in counted]),
        context=mean([chunk.context for chunk in counted]),
    )


def as_text(report: PipelineReport) -> str:
    rows = [
        [
            name,
            number(ms.mean),
            number(ms.p50),
            number(ms.p95),
            significant(report.tflop.get(name)),
            significant(report.tflop_per_s.get(name)),
        ]
        for name, ms in report.stages_ms.items()
    ]
    roofline = report.roofline_tflop_per_s
    memory = "" if report.peak_memory_gb is None else f", peak memory {report.peak_memory_gb:.1f} GB"
    return "\n".join(
        [
            str(report.setting),
            "",
            table(("per chunk", "mean ms", "p50 ms", "p95 ms", "TFLOP", "TFLOP/s"), rows),
            "",
            f"{report.frames_per_s:.2f} frames/s; session planned at {report.planned_memory_gb:.2f} GB{memory}",
            f"roofline: linears {significant(roofline.linears)}, attention {significant(roofline.attention)} TFLOP/s; "
            f"DiT at least {report.roofline_ms:.1f} ms, {100 * report.roofline_share:.0f} % of the roofline reached",
        ]
    )


def setting_of(pipeline: Pipeline, weights: str, run: Run) -> Setting:
    plan, workload = run.plan, run.workload
    return Setting(
        model=pipeline.model_info.model_path,
        weights=weights,
        device=pipeline.model_info.device,
        ranks=pipeline.ranks.world,
        vae_parallel=pipeline.model_info.vae_parallel,
        peer_memory=pipeline.dit.window_attention.uses_peer_memory,
        torch=torch.__version__,
        dtype=pipeline.model_info.dtype,
        vae_dtype=pipeline.model_info.vae_dtype,
        quantization=pipeline.model_info.quantization,
        kv_cache_dtype=pipeline.model_info.kv_cache_dtype,
        compiled=pipeline.model_info.compiled,
        attention_backend=pipeline.model_info.attention_backend,
        size=str(plan.size),
        latent_frames=plan.latent_frames,
        sink_frames=plan.sink_frames,
        window_frames=plan.window_frames,
        visible_frames=(min(run.visible_frames), max(run.visible_frames)),
        steps=plan.num_steps,
        case=f"chunks 0 to {OPENING_CHUNKS - 1}" if workload.opening else "steady",
        warm_chunks=workload.warm_chunks(plan),
        chunks=len(run.chunks),
    )
