"""``lingbot-rt bench``: measures the pipeline, the collectives of several GPUs, the transports, or a running server."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from lingbot_rt.commands import bench_load, bench_replicas
from lingbot_rt.commands.bench_options import (
    add_collectives_options,
    add_fidelity_options,
    add_pipeline_options,
    add_serve_options,
    add_targets_options,
    add_transport_options,
)
from lingbot_rt.commands.local_engine import StartupBars
from lingbot_rt.commands.options import (
    api_key_from,
    given_options,
    output_file,
    require_existing,
    require_session_size,
)
from lingbot_rt.commands.output import say
from lingbot_rt.config import OUTPUT_FORMATS, ServeConfig
from lingbot_rt.errors import ConfigError

if TYPE_CHECKING:
    from lingbot_rt.bench.pipeline import Workload
    from lingbot_rt.bench.pipeline_report import PipelineReport
    from lingbot_rt.bench.ranks import Job
    from lingbot_rt.bench.windows import WindowsReport
    from lingbot_rt.engine.pipeline import Pipeline
    from lingbot_rt.parallel.coordinator import Coordinator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, summary, add_options, measure in (
        ("pipeline", "chunk time on the device: DiT, VAE, frames/s, TFLOP/s", add_pipeline_options, _pipeline),
        (
            "collectives",
            "what several GPUs exchange per chunk: ms, GB/s, share of a chunk",
            add_collectives_options,
            _collectives,
        ),
        ("targets", "every performance target for one GPU, beside the measured value", add_targets_options, _targets),
        (
            "fidelity",
            "how far faster settings are from the exact one: errors of latents, PSNR of frames",
            add_fidelity_options,
            _fidelity,
        ),
        (
            "transport",
            "encoding time and size of each transport, beside plain Pillow",
            add_transport_options,
            _transport,
        ),
        (
            "serve",
            "a running server as its client sees it: rate, latency, jitter, underruns",
            add_serve_options,
            _serve,
        ),
        (
            "load",
            "a running server under many clients: waiting, first frames, cadence, errors",
            bench_load.add_options,
            bench_load.measure,
        ),
        (
            "replicas",
            "time in line by the number of replicas, from a simulation of random clients",
            bench_replicas.add_options,
            bench_replicas.measure,
        ),
    ):
        options = kinds.add_parser(kind, help=summary, description=f"Measures {summary}.")
        add_options(options)
        options.add_argument(
            "--json", type=output_file, metavar="FILE", help="write every figure and the setting to this file"
        )
        options.set_defaults(measure=measure)


def run(args: argparse.Namespace) -> int:
    require_session_size(getattr(args, "size", None))
    require_existing("--first-frame", getattr(args, "first_frame", None))
    return args.measure(args)


def _pipeline(args: argparse.Namespace) -> int:
    from lingbot_rt.bench import scaling
    from lingbot_rt.bench.apart import in_a_process
    from lingbot_rt.bench.chart import bar_chart
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.pipeline import Workload
    from lingbot_rt.bench.pipeline_report import as_text
    from lingbot_rt.bench.windows import as_text as windows_text

    opening = args.case == "sglang-ci"
    if opening and args.warm is not None:
        raise ConfigError("--warm: the case sglang-ci starts at chunk 0 and does its own warm-up", field="warm")
    if len(args.ranks) > 1 and (args.plot or args.profile):
        raise ConfigError("--plot and --profile need one measurement: name one --num-gpus", field="num_gpus")
    if args.windows and (opening or len(args.ranks) > 1 or args.plot or args.profile):
        raise ConfigError(
            "--interactive-kv-window compares steady chunks on one --num-gpus, without --plot and --profile",
            field="interactive_kv_window",
        )
    workload = Workload(
        size=args.size,
        sink_frames=args.sink if args.sink is not None or not opening else 9,
        window_frames=args.window or (18 if opening else None),
        num_steps=args.steps,
        chunks=args.chunks,
        warm=args.warm,
        opening=opening,
    )
    jobs = [_job(args, ranks) for ranks in args.ranks]
    for job in jobs:
        job.require_ranks()  # all of them, before the first is measured
    if args.windows:
        windows = _measure_windows(jobs[0], workload)
        say(windows_text(windows))
        write_json(args.json, windows)
        return 0
    # The ranks of a process write into each other's memory in its first measurement only.
    is_apart = sum(ranks > 1 for ranks in args.ranks) > 1
    reports = []
    for job in jobs:
        task = job, workload, args.profile
        reports.append(in_a_process(_measure, *task) if is_apart else _measure(*task))
        say(as_text(reports[-1]) + "\n")
    if len(reports) == 1:
        write_json(args.json, reports[0])
        if args.plot:
            bar_chart(reports[0].stages_ms, str(reports[0].setting)).save(args.plot)
        return 0
    comparison = scaling.Comparison.of(reports)
    say(scaling.as_text(comparison))
    write_json(args.json, comparison)
    return 0


@contextmanager
def _loaded(job: Job) -> Iterator[tuple[Pipeline, Coordinator]]:
    """The networks, freed at the end. Prints the loading time on stderr, beside the bars."""
    from lingbot_rt.bench.ranks import pipeline_on_ranks

    started = time.perf_counter()
    with ExitStack() as stack:
        with StartupBars() as bars:
            pipeline, coordinator = stack.enter_context(pipeline_on_ranks(job, bars.show))
        took_s = time.perf_counter() - started
        schedule = f"shift {pipeline.schedule.shift:g}, steps {', '.join(map(str, pipeline.schedule.steps))}"
        loaded = f"{job.config.model_path} loaded on {pipeline.model_info.device} in {took_s:.1f} s"
        print(f"{loaded}; schedule: {schedule}", file=sys.stderr)
        yield pipeline, coordinator


def _measure_windows(job: Job, workload: Workload) -> WindowsReport:
    from tqdm import tqdm

    from lingbot_rt.bench.windows import measure_windows

    with _loaded(job) as (pipeline, coordinator), tqdm(unit="chunk", disable=None) as bar:
        return measure_windows(pipeline, workload, _weights(job), bar.update, coordinator)


def _measure(job: Job, workload: Workload, trace: str | None) -> PipelineReport:
    from tqdm import tqdm

    from lingbot_rt.bench.pipeline import profile_chunk, run_chunks
    from lingbot_rt.bench.pipeline_report import full_shape, pipeline_report
    from lingbot_rt.bench.roofline import measure_roofline

    with _loaded(job) as (pipeline, coordinator):
        plan = workload.session_plan(pipeline)
        total = workload.warm_chunks(plan) + workload.measured_chunks()
        with tqdm(total=total, unit="chunk", disable=None) as bar:
            run = run_chunks(pipeline, workload, bar.update, coordinator)
        roofline = measure_roofline(pipeline, full_shape(plan))
        report = pipeline_report(pipeline, _weights(job), run, roofline)
        if trace:
            profile_chunk(pipeline, workload, trace, coordinator)
        return report


def _weights(job: Job) -> str:
    return "random" if job.random_weights else "loaded"


def _collectives(args: argparse.Namespace) -> int:
    from lingbot_rt.bench.collectives import CollectivesReport, CollectivesSpec, as_text
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.random_model import random_model
    from lingbot_rt.bench.ranks import measure_on_ranks
    from lingbot_rt.engine.device import describe_device, resolve_device, resolve_dtype, resolve_kv_cache_dtype

    if args.ranks == 1:
        raise ConfigError("--num-gpus 1 has nothing to exchange: use 2 or more", field="num_gpus")
    job = _job(args, args.ranks)
    model, device = random_model(job.config), resolve_device(job.config.device)
    size = args.size or model.default_size
    steps = args.steps or len(model.schedule.steps)
    dtype = resolve_dtype(job.config.dtype, device)
    dtypes = dtype, resolve_kv_cache_dtype(job.config.kv_cache_dtype, dtype)
    spec = CollectivesSpec.of(model, size, steps, dtypes, args.repeats)
    report = CollectivesReport.of(
        spec,
        measure_on_ranks(job, spec),
        model=args.model,
        device=describe_device(device),
        ranks=args.ranks,
        chunk_ms=args.chunk_ms,
    )
    say(as_text(report))
    write_json(args.json, report)
    return 0


def _targets(args: argparse.Namespace) -> int:
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.pipeline import Workload
    from lingbot_rt.bench.targets import TargetsReport, as_text, measure_targets

    workload = Workload(
        size=args.size,
        sink_frames=args.sink,
        window_frames=args.window,
        chunks=args.chunks,
    )
    reports: list[TargetsReport] = []

    def on_case(report: TargetsReport) -> None:
        # Written after every case, so that a crash in the next one loses nothing.
        write_json(args.json, report)
        print(f"{report.rows[-1].case}: finished after {report.minutes:.1f} minutes", file=sys.stderr, flush=True)
        reports[:] = [report]

    config = ServeConfig(model_path=args.model, **given_options(args))
    measure_targets(config, workload, args.far, on_case)
    say(as_text(reports[0]))
    return 1 if any(row.error for row in reports[0].rows) else 0


def _fidelity(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lingbot_rt.bench.fidelity import SESSIONS, FidelityReport, as_text, measure_fidelity
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.pipeline import Workload

    workload = Workload(
        size=args.size,
        sink_frames=args.sink,
        window_frames=args.window,
        num_steps=args.steps,
        chunks=args.chunks,
    )
    reports: list[FidelityReport] = []

    def on_variant(report: FidelityReport) -> None:
        # Written after every variant, so that a crash in the next one loses nothing.
        write_json(args.json, report)
        reports[:] = [report]

    options = given_options(args)
    config = ServeConfig(model_path=args.model, **options)
    frames_config = ServeConfig(model_path=args.frames_model, **options)
    with tqdm(total=SESSIONS * args.chunks, unit="chunk", disable=None) as bar:
        measure_fidelity(config, workload, frames_config, bar.update, on_variant)
    say(as_text(reports[0]))
    return 1 if any(row.note for row in reports[0].rows) else 0


def _transport(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.transport import as_text, measure_transport

    with tqdm(total=2 * len(OUTPUT_FORMATS), unit="encoder", disable=None) as bar:
        report = measure_transport(args.size, args.frames, bar.update)
    say(as_text(report))
    write_json(args.json, report)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.serve import SessionSpec, as_text, model_facts, run_session, serve_report
    from lingbot_rt.client.server_info import served_size
    from lingbot_rt.commands.session_options import DEFAULT_PROMPT, checked_init, first_frame_bytes, init_fields

    api_key = api_key_from(args)
    options = {
        "prompt": DEFAULT_PROMPT,
        "first_frame": first_frame_bytes(args.first_frame),
        "fps": args.fps,
        "max_chunks": args.chunks,
        "realtime_output_format": args.format,
    }
    extra = init_fields(args.init)
    checked_init(options, extra)  # before the server is asked
    size = args.size or served_size(args.url, api_key)
    init, _ = checked_init(options | {"size": None if size is None else str(size)}, extra)
    spec = SessionSpec(
        url=args.url,
        api_key=api_key,
        init=init,
        press_every_s=args.press_every,
        playback_fps=args.playback_fps or args.fps,
        playback_lead_s=args.playback_lead,
    )
    model = model_facts(args.url, api_key)
    with tqdm(unit="frame", disable=None) as bar:
        observed = run_session(spec, bar.update)
    report = serve_report(spec, model, observed)
    say(as_text(report))
    write_json(args.json, report)
    return 0


def _job(args: argparse.Namespace, num_gpus: int) -> Job:
    """Raises ConfigError for options that don't fit together."""
    from lingbot_rt.bench.ranks import Job
    from lingbot_rt.models.model_path import PUBLISHED

    if args.kind == "pipeline" and args.model in PUBLISHED and not args.random_weights:
        raise ConfigError(
            f"--model {args.model} has shapes but no weights: add --random-weights, or name a folder or a hub id",
            field="model",
        )
    options = given_options(args)
    if num_gpus == 1:
        options.pop("vae_parallel", None)
    config = ServeConfig(model_path=args.model, num_gpus=num_gpus, **options)
    if args.kind == "collectives":
        return Job(config, random_weights=True, exchanges_only=True)
    return Job(config, random_weights=args.random_weights)
