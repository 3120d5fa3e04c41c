"""Measures every performance target for one accelerator in one run, on the same warm device.

A case that fails is reported with its error and the next one runs, so that one failure does not waste the device time.
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
from lingbot_rt.bench.pipeline import (
    SyntheticSession,
    TimedChunk,
    Workload,
    peak_memory_gb,
    reset_peak_memory,
    run_chunks,
)
from lingbot_rt.bench.random_model import random_pipeline, random_vae
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.compilation import resolve_compile, set_compile_cache, tuned_convolutions
from lingbot_rt.engine.model_memory import require_memory
from lingbot_rt.engine.pipeline import Pipeline, compile_networks
from lingbot_rt.errors import one_line
from lingbot_rt.models.model_path import DUMMY, LINGBOT_WORLD_FAST
from lingbot_rt.models.quantize import FP8, quantize_linears, require_fp8
from lingbot_rt.session.plan import SessionPlan

log = logging.getLogger(__name__)

_FIGURES = ("DiT", "VAE", "after denoise", "total")
_AFTER_JUMP = 2  # chunks left out after a jump
_MAX_UNCOMPILED = 5  # chunks measured without compilation, which are slow

TARGETS_MS = {
    ("bfloat16 compiled", "DiT"): (1880, 1780),
    ("bfloat16 compiled", "after denoise"): (70, 50),
    ("bfloat16 compiled", "total"): (1950, 1830),
    ("fp8 linears and window, compiled", "DiT"): (1450, 1280),
    ("fp8 linears and window, compiled", "after denoise"): (70, 50),
    ("fp8 linears and window, compiled", "total"): (1490, 1320),
    ("fp8 linears and window, compiled", "peak memory, GB"): (42, 40),
    ("chunks 0 to 3", "DiT"): (1350, 1250),
    ("chunks 0 to 3", "VAE"): (140, 100),
    ("VAE alone, bfloat16 compiled", "VAE"): (135, 100),
    ("VAE alone, float32 compiled", "VAE"): (250, 200),
}
"""(required, desired) values per chunk of the 14B at 832x480, window 18, sink 9, on one H100: milliseconds or GB."""

FAR_TOLERANCE = 0.02
"""A far chunk may take this fraction more or less time than a near one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one case, in ms per chunk unless its name gives another unit."""

    case: str
    figure: str
    value: Spread | None = None
    required: float | None = None
    desired: float | None = None
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


def measure_targets(
    config: ServeConfig, workload: Workload, far_chunk: int, on_case: Callable[[TargetsReport], None]
) -> None:
    """Runs all cases with random weights of ``config``'s model. Calls ``on_case`` with the report after every case.

    Raises what ``random_pipeline`` raises. Later errors become rows of the report.
    """
    started = time.perf_counter()
    require_memory(replace(config, load_format=DUMMY), text_encoder=False, offered=("dtype", "dit_cpu_offload"))
    pipeline = random_pipeline(replace(config, compile="false", quantization="none"))
    plan = workload.session_plan(pipeline)
    report = TargetsReport(
        model=config.model_path,
        device=pipeline.model_info.device,
        torch=torch.__version__,
        size=str(plan.size),
        sink_frames=plan.sink_frames,
        window_frames=plan.window_frames,
        steps=plan.num_steps,
        chunks=workload.chunks,
    )
    for case, run in _cases(pipeline, config, workload, plan, far_chunk):
        report.rows += _rows(case, run, with_targets=config.model_path == LINGBOT_WORLD_FAST)
        report.minutes = (time.perf_counter() - started) / 60
        on_case(report)
        _free_memory()


Figures = dict[str, list[float]]


def _cases(
    pipeline: Pipeline, config: ServeConfig, workload: Workload, plan: SessionPlan, far_chunk: int
) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """(name, run) of each case, in order. Between cases the one pipeline is compiled and then quantized in place."""
    dtype = pipeline.model_info.dtype
    compiles = resolve_compile(config.compile, pipeline.device)
    how = "compiled" if compiles else "not compiled"
    yield (
        f"{dtype} not compiled",
        lambda: _steady(pipeline, replace(workload, chunks=min(workload.chunks, _MAX_UNCOMPILED))),
    )
    if compiles:
        set_compile_cache(config.compile_cache)
        compile_networks(pipeline.dit, pipeline.vae, pipeline.device, pipeline.kv_cache_dtype)
        yield f"{dtype} compiled", lambda: _steady(pipeline, workload)
    yield "chunks 0 to 3", lambda: _steady(pipeline, replace(workload, opening=True, warm=None))
    yield (
        f"chunk {far_chunk} beside chunk {workload.warm_chunks(plan)}",
        lambda: _far(pipeline, workload, plan, far_chunk),
    )

    def fp8() -> Figures:
        require_fp8(pipeline.device, pipeline.dtype)
        for block in pipeline.dit.blocks:
            quantize_linears(block)
        _free_memory()
        return _steady(replace(pipeline, kv_cache_dtype=FP8), workload)

    yield f"fp8 linears and window, {how}", fp8
    for vae_dtype in ("float32", "bfloat16"):
        for compiled in (False, True) if compiles else (False,):
            case = f"VAE alone, {vae_dtype} {'compiled' if compiled else 'not compiled'}"
            yield case, partial(_vae_alone, replace(config, vae_dtype=vae_dtype), plan, workload, compiled)


def _rows(case: str, run: Callable[[], Figures], *, with_targets: bool) -> list[Row]:
    try:
        figures = run()
    except Exception as error:
        log.exception("%s", case)
        return [Row(case, "-", error=one_line(error))]
    rows = []
    for figure, values in figures.items():
        required, desired = TARGETS_MS.get((case, figure), (None, None)) if with_targets else (None, None)
        rows.append(Row(case, figure, Spread.of(values), required, desired))
    return rows


def _steady(pipeline: Pipeline, workload: Workload) -> Figures:
    run = run_chunks(pipeline, workload, lambda: None)
    figures = _figures_of(run.chunks)
    if run.peak_memory_gb is not None:
        figures["peak memory, GB"] = [run.peak_memory_gb]
    return figures


def _figures_of(chunks: list[TimedChunk]) -> Figures:
    stages = [chunk.stages() for chunk in chunks]
    return {name: [stage[name] for stage in stages] for name in _FIGURES}


def _far(pipeline: Pipeline, workload: Workload, plan: SessionPlan, far_chunk: int) -> Figures:
    """One session with a full window, measured near its start and far from it: the chunk time must not grow."""
    session = SyntheticSession(pipeline, plan)
    with tuned_convolutions():
        for _ in range(workload.warm_chunks(plan)):
            session.step()
    reset_peak_memory(pipeline.device)
    near = [session.step() for _ in range(workload.chunks)]
    near_memory = peak_memory_gb(pipeline.device)
    session.jump(far_chunk)
    for _ in range(_AFTER_JUMP):
        session.step()
    reset_peak_memory(pipeline.device)
    far = [session.step() for _ in range(workload.chunks)]
    near_ms, far_ms = (Spread.of([chunk.stages()["total"] for chunk in chunks]).p50 for chunks in (near, far))
    figures = {
        "total, near": [near_ms],
        "total, far": [far_ms],
        f"far / near (1 +- {FAR_TOLERANCE})": [far_ms / near_ms],
    }
    far_memory = peak_memory_gb(pipeline.device)
    if near_memory is not None and far_memory is not None:
        figures["peak memory, far - near, GB"] = [far_memory - near_memory]
    return figures


@torch.inference_mode()
def _vae_alone(config: ServeConfig, plan: SessionPlan, workload: Workload, compiled: bool) -> Figures:
    """Decode time of a chunk with nothing else running."""
    vae = random_vae(config)
    if compiled:
        vae.compile()
    features = vae.new_features()
    size = plan.size
    latents = torch.randn(1, vae.z_dim, plan.latent_frames, size.latent_height, size.latent_width, device=vae.device)

    def chunk_ms() -> float:
        started = time.perf_counter()
        for latent in latents.split(1, dim=2):
            vae.decode_latent_frame(latent, features)
        if vae.device.type == "cuda":
            torch.cuda.synchronize(vae.device)
        return 1000 * (time.perf_counter() - started)

    with tuned_convolutions():
        warm = [chunk_ms() for _ in range(3)]
    return {"VAE": [chunk_ms() for _ in range(max(workload.chunks, len(warm)))]}


def _free_memory() -> None:
    """Frees what a case left behind, to make room for the next one's window."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_text(report: TargetsReport) -> str:
    rows = []
    for row in report.rows:
        value = row.value
        verdict = ""
        if value is not None and row.required is not None and row.desired is not None:
            verdict = "desired" if value.p50 <= row.desired else "required" if value.p50 <= row.required else "missed"
        p50, p95 = ("-", "-") if value is None else (number(value.p50, 3), number(value.p95, 3))
        rows.append(
            [row.case, row.error or row.figure, p50, p95, number(row.required, 0), number(row.desired, 0), verdict]
        )
    return "\n".join(
        [
            f"{report.model} (random weights), {report.device}, torch {report.torch}",
            f"{report.size}, window {report.window_frames} (sink {report.sink_frames}), {report.steps} steps, "
            f"{report.chunks} chunks per case, {report.minutes:.1f} minutes in all",
            "",
            table(("case", "figure", "p50 ms", "p95 ms", "required", "desired", "meets"), rows),
        ]
    )
