"""Every figure that is aimed for on one accelerator, in one go: each case on the same warm device, each beside its bar.

A case that fails is reported with its error, and the next one runs: a device is not to be had every day.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lingbot_rt.bench.figures import Spread, number, table
from lingbot_rt.bench.pipeline import Load, TimedChunk, Walk, peak_memory_gb, reset_peak_memory, run_chunks
from lingbot_rt.bench.random_model import LINGBOT_WORLD_FAST, random_pipeline, random_vae
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.compilation import resolve_compile, set_compile_cache
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.models.quantize import quantize_linears, require_fp8
from lingbot_rt.session.plan import SessionPlan

log = logging.getLogger(__name__)

_FIGURES = ("DiT", "VAE", "after denoise", "total")
_AFTER_JUMP = 2  # chunks not measured behind a jump
_FEW = 5

BARS = {
    ("bfloat16 compiled", "DiT"): (2000, 1800),
    ("bfloat16 compiled", "after denoise"): (80, 50),
    ("fp8 compiled", "DiT"): (1650, 1450),
    ("fp8 compiled", "after denoise"): (80, 50),
    ("chunks 0 to 3", "DiT"): (1400, 1250),
    ("chunks 0 to 3", "VAE"): (150, 100),
    ("VAE alone, bfloat16 compiled", "VAE"): (145, 100),
    ("VAE alone, float32 compiled", "VAE"): (145, 100),
}
"""To reach, and to aim for then: milliseconds a chunk of the 14B at 832x480, window 18, sink 9, on one H100."""

FLAT = 0.02
"""A far chunk may cost so much more or less than a near one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one case, in ms a chunk unless its name says otherwise."""

    case: str
    figure: str
    value: Spread | None = None
    reach: float | None = None
    aim: float | None = None
    error: str = ""


@dataclass(slots=True)
class TargetsReport:
    model: str
    device: str
    torch: str
    size: str
    sink_frames: int
    window_frames: int
    steps: int
    chunks: int
    rows: list[Row] = field(default_factory=list)
    minutes: float = 0.0


def measure_targets(config: ServeConfig, load: Load, far_chunk: int, told: Callable[[TargetsReport], None]) -> None:
    """Random weights of ``config``'s model under ``load``; ``told`` gets the report after every case.

    Raises what a pipeline that cannot be built raises; later errors are rows.
    """
    begun = time.perf_counter()
    pipeline = random_pipeline(replace(config, compile="false", quantization="none"))
    plan = load.session_plan(pipeline)
    report = TargetsReport(
        model=config.model_path,
        device=pipeline.model_info.device,
        torch=torch.__version__,
        size=str(plan.size),
        sink_frames=plan.sink_frames,
        window_frames=plan.window_frames,
        steps=plan.num_steps,
        chunks=load.chunks,
    )
    for case, run in _cases(pipeline, config, load, plan, far_chunk):
        report.rows += _rows(case, run, with_bars=config.model_path == LINGBOT_WORLD_FAST)
        report.minutes = (time.perf_counter() - begun) / 60
        told(report)
        _tidy()


Figures = dict[str, list[float]]


def _cases(
    pipeline: Pipeline, config: ServeConfig, load: Load, plan: SessionPlan, far_chunk: int
) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """In order; between two of them the one pipeline is compiled, then quantized, in place: two would not fit."""
    dtype = pipeline.model_info.dtype
    compiles = resolve_compile(config.compile, pipeline.device)
    how = "compiled" if compiles else "not compiled"
    yield f"{dtype} not compiled", lambda: _steady(pipeline, replace(load, chunks=min(load.chunks, _FEW)))
    if compiles:
        set_compile_cache(config.compile_cache)
        pipeline.dit.compile_blocks()
        pipeline.vae.compile()
        yield f"{dtype} compiled", lambda: _steady(pipeline, load)
    yield "chunks 0 to 3", lambda: _steady(pipeline, replace(load, opening=True, warm=None))
    yield f"chunk {far_chunk} beside chunk {load.warm_chunks(plan)}", lambda: _far(pipeline, load, plan, far_chunk)

    def fp8() -> Figures:
        require_fp8(pipeline.device, pipeline.dtype)
        for block in pipeline.dit.blocks:
            quantize_linears(block)
        _tidy()
        return _steady(pipeline, load)

    yield f"fp8 {how}", fp8
    for vae_dtype in ("float32", "bfloat16"):
        for compiled in (False, True) if compiles else (False,):
            case = f"VAE alone, {vae_dtype} {'compiled' if compiled else 'not compiled'}"
            yield case, partial(_vae_alone, replace(config, vae_dtype=vae_dtype), plan, load, compiled)


def _rows(case: str, run: Callable[[], Figures], *, with_bars: bool) -> list[Row]:
    try:
        figures = run()
    except Exception as error:
        log.exception("%s", case)
        return [Row(case, "-", error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")]
    rows = []
    for figure, values in figures.items():
        reach, aim = BARS.get((case, figure), (None, None)) if with_bars else (None, None)
        rows.append(Row(case, figure, Spread.of(values), reach, aim))
    return rows


def _steady(pipeline: Pipeline, load: Load) -> Figures:
    run = run_chunks(pipeline, load, lambda: None)
    figures = _figures_of(run.chunks)
    if run.peak_memory_gb is not None:
        figures["peak memory, GB"] = [run.peak_memory_gb]
    return figures


def _figures_of(chunks: list[TimedChunk]) -> Figures:
    stages = [chunk.stages() for chunk in chunks]
    return {name: [stage[name] for stage in stages] for name in _FIGURES}


def _far(pipeline: Pipeline, load: Load, plan: SessionPlan, far_chunk: int) -> Figures:
    """One session with its window full, near its start and then far from it: what a chunk costs must not grow."""
    walk = Walk(pipeline, plan)
    for _ in range(load.warm_chunks(plan)):
        walk.step()
    reset_peak_memory(pipeline.device)
    near = [walk.step() for _ in range(load.chunks)]
    near_memory = peak_memory_gb(pipeline.device)
    walk.jump(far_chunk)
    for _ in range(_AFTER_JUMP):
        walk.step()
    reset_peak_memory(pipeline.device)
    far = [walk.step() for _ in range(load.chunks)]
    near_ms, far_ms = (Spread.of([chunk.stages()["total"] for chunk in chunks]).p50 for chunks in (near, far))
    figures = {"total, near": [near_ms], "total, far": [far_ms], f"far / near (1 +- {FLAT})": [far_ms / near_ms]}
    far_memory = peak_memory_gb(pipeline.device)
    if near_memory is not None and far_memory is not None:
        figures["peak memory, far - near, GB"] = [far_memory - near_memory]
    return figures


@torch.inference_mode()
def _vae_alone(config: ServeConfig, plan: SessionPlan, load: Load, compiled: bool) -> Figures:
    """Milliseconds of a chunk's decode with nothing beside it."""
    vae = random_vae(config)
    if compiled:
        vae.compile()
    features = vae.new_features()
    size = plan.size
    latents = torch.randn(1, vae.z_dim, plan.latent_frames, size.latent_height, size.latent_width, device=vae.device)

    def chunk_ms() -> float:
        begun = time.perf_counter()
        for latent in latents.split(1, dim=2):
            vae.decode_latent_frame(latent, features)
        if vae.device.type == "cuda":
            torch.cuda.synchronize(vae.device)
        return 1000 * (time.perf_counter() - begun)

    warm = [chunk_ms() for _ in range(3)]
    return {"VAE": [chunk_ms() for _ in range(max(load.chunks, len(warm)))]}


def _tidy() -> None:
    """What a case left behind is not to stand beside the next one's window."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_text(report: TargetsReport) -> str:
    rows = []
    for row in report.rows:
        value = row.value
        verdict = ""
        if value is not None and row.reach is not None and row.aim is not None:
            verdict = "aim" if value.p50 <= row.aim else "reached" if value.p50 <= row.reach else "missed"
        p50, p95 = ("-", "-") if value is None else (number(value.p50, 3), number(value.p95, 3))
        rows.append([row.case, row.error or row.figure, p50, p95, number(row.reach, 0), number(row.aim, 0), verdict])
    return "\n".join(
        [
            f"{report.model} (random weights), {report.device}, torch {report.torch}",
            f"{report.size}, window {report.window_frames} (sink {report.sink_frames}), {report.steps} steps, "
            f"{report.chunks} chunks a case, {report.minutes:.1f} minutes in all",
            "",
            table(("case", "figure", "p50 ms", "p95 ms", "reach", "aim", ""), rows),
        ]
    )
