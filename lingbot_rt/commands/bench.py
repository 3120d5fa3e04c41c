"""``lingbot-rt bench``: measure the pipeline on its devices, what they say to each other, the transports, or a server
as a player meets it."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lingbot_rt.commands.options import add_options_named, given_options
from lingbot_rt.commands.progress import StageBars
from lingbot_rt.commands.walk import parse_size
from lingbot_rt.config import OUTPUT_FORMATS
from lingbot_rt.errors import ConfigError

if TYPE_CHECKING:
    from lingbot_rt.bench.pipeline import Load
    from lingbot_rt.bench.pipeline_report import PipelineReport
    from lingbot_rt.bench.ranks import Job

DEVICE_OPTIONS = (
    "device",
    "dtype",
    "quantization",
    "vae_dtype",
    "compile",
    "compile_cache",
    "dit_cpu_offload",
    "attention_backend",
    "vae_parallel",
)
"""Of ``serve``, those that change how fast the pipeline is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_pipeline(kinds.add_parser("pipeline", help="steady chunks on the device: DiT, VAE, frames/s, TFLOP/s"))
    _add_collectives(
        kinds.add_parser("collectives", help="what several GPUs exchange in a chunk, alone: ms, GB/s, share of a chunk")
    )
    _add_targets(
        kinds.add_parser("targets", help="every figure aimed for on one accelerator, in one go, beside its bar")
    )
    _add_transport(kinds.add_parser("transport", help="what each way of sending frames costs, beside plain Pillow"))
    _add_serve(
        kinds.add_parser("serve", help="a running server as a player meets it: rate, latency, jitter, underruns")
    )


def run(args: argparse.Namespace) -> int:
    kinds = {
        "pipeline": _pipeline,
        "collectives": _collectives,
        "targets": _targets,
        "transport": _transport,
        "serve": _serve,
    }
    return kinds[args.kind](args)


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--random-weights", action="store_true", help="the model's shapes with random weights, made on the device"
    )
    parser.add_argument(
        "--num-gpus",
        dest="ranks",
        type=_counts,
        default=(1,),
        metavar="N[,N...]",
        help="processes that share each session; several numbers are measured one after the other and compared "
        "(default: 1)",
    )
    parser.add_argument(
        "--window", type=_count, metavar="N", help="latent frames attended to (default: the model's; 14B: 18)"
    )
    parser.add_argument(
        "--sink",
        type=_count_from_zero,
        metavar="N",
        help="of those, kept from the start (default: the model's; 14B: 9)",
    )
    parser.add_argument("--chunks", type=_count, default=20, metavar="N", help="chunks measured (default: %(default)s)")
    parser.add_argument(
        "--warm",
        type=_count_from_zero,
        metavar="N",
        help="chunks before them (default: as many as fill the window, at least 6)",
    )
    parser.add_argument(
        "--case",
        choices=("sglang-ci",),
        metavar="sglang-ci",
        help="sglang-ci: the mean of chunks 0 to 3 with window 18 and sink 9, over --chunks / 4 sessions",
    )
    add_options_named(parser, DEVICE_OPTIONS)
    _add_json(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="a bar chart of the stages")
    parser.add_argument(
        "--profile", metavar="FILE.json", help="a Chrome trace of one chunk, made after the measurement"
    )


def _add_collectives(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add_options_named(parser, ("device", "dtype"))
    parser.add_argument(
        "--num-gpus",
        dest="ranks",
        type=_count,
        default=2,
        metavar="N",
        help="processes that exchange (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=_count, default=20, metavar="N", help="calls a round, of five (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk-ms", type=_positive, metavar="MS", help="of the chunk that the shares are of, from bench pipeline"
    )
    _add_json(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--model",
        default="lingbot-world-fast",
        help="lingbot-world-fast (the published 14B's shapes), builtin, a diffusers folder, or a hub id "
        "(default: %(default)s)",
    )
    parser.add_argument("--size", metavar="WxH", help="of the frames (default: the model's)")
    parser.add_argument("--steps", type=_count, metavar="N", help="denoise steps a chunk (default: the model's)")


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="lingbot-world-fast",
        help="whose shapes: lingbot-world-fast (the 14B), builtin, a diffusers folder, or a hub id "
        "(default: %(default)s)",
    )
    parser.add_argument("--size", metavar="WxH", help="of the frames (default: the model's)")
    parser.add_argument("--window", type=_count, metavar="N", help="latent frames attended to (14B: 18)")
    parser.add_argument("--sink", type=_count_from_zero, metavar="N", help="of those, kept from the start (14B: 9)")
    parser.add_argument("--chunks", type=_count, default=10, metavar="N", help="a case (default: %(default)s)")
    parser.add_argument("--far", type=_count, default=2000, metavar="N", help="the far chunk (default: %(default)s)")
    varied = ("quantization", "vae_dtype", "vae_parallel")  # by the cases themselves, or of several GPUs
    add_options_named(parser, [name for name in DEVICE_OPTIONS if name not in varied])
    _add_json(parser)


def _add_transport(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="832x480", metavar="WxH", help="of the frames (default: %(default)s)")
    parser.add_argument("--frames", type=_count, default=96, metavar="N", help="frames measured (default: %(default)s)")
    _add_json(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("LINGBOT_RT_API_KEY"), metavar="TEXT", help="when it has one"
    )
    parser.add_argument("--size", metavar="WxH", help="of the frames (default: the model's)")
    parser.add_argument("--first-frame", metavar="FILE", help="the picture it starts from (default: a small preset)")
    parser.add_argument(
        "--chunks", type=_count, default=30, metavar="N", help="chunks of the session (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=OUTPUT_FORMATS,
        metavar="|".join(OUTPUT_FORMATS),
        help="transport of the frames (default: the server's)",
    )
    parser.add_argument("--fps", type=_positive, default=16.0, metavar="N", help="asked of the server (default: 16)")
    parser.add_argument(
        "--press-every",
        type=_positive,
        default=0.7,
        metavar="S",
        help="mean seconds between key changes (default: 0.7)",
    )
    parser.add_argument(
        "--playback-fps", type=_positive, metavar="N", help="of the player whose underruns count (default: --fps)"
    )
    parser.add_argument(
        "--playback-lead", type=_positive, default=0.5, metavar="S", help="how far behind it plays (default: 0.5)"
    )
    parser.add_argument(
        "--init", action="append", default=[], metavar="FIELD=VALUE", help="any other field of the init, such as seed=7"
    )
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="every figure, with the setting it was measured in")


def _pipeline(args: argparse.Namespace) -> int:
    from lingbot_rt.bench import scaling
    from lingbot_rt.bench.chart import bar_chart
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.pipeline import Load
    from lingbot_rt.bench.pipeline_report import as_text

    opening = args.case == "sglang-ci"
    if opening and args.warm is not None:
        raise ConfigError("--warm: the case sglang-ci begins at chunk 0 and warms up by itself", field="warm")
    if len(args.ranks) > 1 and (args.plot or args.profile):
        raise ConfigError("--plot and --profile are of one measurement: name one --num-gpus", field="num_gpus")
    load = Load(
        size=parse_size(args.size) if args.size else None,
        sink_frames=args.sink if args.sink is not None or not opening else 9,
        window_frames=args.window or (18 if opening else None),
        num_steps=args.steps,
        chunks=args.chunks,
        warm=args.warm,
        opening=opening,
    )
    jobs = [_job(args, ranks) for ranks in args.ranks]
    reports = []
    for job in jobs:
        reports.append(_measured(job, load, args.profile))
        print(as_text(reports[-1]) + "\n")
    if len(reports) == 1:
        write_json(args.json, reports[0])
        if args.plot:
            bar_chart(reports[0].stages_ms, str(reports[0].setting)).save(args.plot)
        return 0
    comparison = scaling.Comparison.of(reports)
    print(scaling.as_text(comparison))
    write_json(args.json, comparison)
    return 0


def _measured(job: Job, load: Load, trace: str | None) -> PipelineReport:
    """The networks are gone when this returns. How long they took to come goes to stderr, beside the bars."""
    from tqdm import tqdm

    from lingbot_rt.bench.ceiling import measure_ceiling
    from lingbot_rt.bench.pipeline import profile_chunk, run_chunks
    from lingbot_rt.bench.pipeline_report import full_shape, pipeline_report
    from lingbot_rt.bench.ranks import measured

    begun = time.perf_counter()
    with ExitStack() as stack:
        with StageBars() as bars:
            pipeline, leader = stack.enter_context(measured(job, bars.show))
        took_s = time.perf_counter() - begun
        print(f"{job.config.model_path} on {pipeline.model_info.device} in {took_s:.1f} s", file=sys.stderr)
        plan = load.session_plan(pipeline)
        total = load.warm_chunks(plan) + load.measured_chunks()
        with tqdm(total=total, unit="chunk", disable=None) as bar:
            run = run_chunks(pipeline, load, bar.update, leader)
        ceiling = measure_ceiling(pipeline, full_shape(plan))
        report = pipeline_report(pipeline, "random" if job.random_weights else "loaded", run, ceiling)
        if trace:
            profile_chunk(pipeline, load, trace, leader)
        return report


def _collectives(args: argparse.Namespace) -> int:
    from lingbot_rt.bench.collectives import CollectivesReport, Exchanges, as_text
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.random_model import shapes_of
    from lingbot_rt.bench.ranks import measured_exchanges
    from lingbot_rt.engine.pipeline import describe_device, resolve_device, resolve_dtype

    if args.ranks == 1:
        raise ConfigError("--num-gpus 1 has nothing to exchange: use 2 or more", field="num_gpus")
    job = _job(args, args.ranks)
    shapes, device = shapes_of(args.model), resolve_device(job.config.device)
    size = parse_size(args.size) if args.size else shapes.default_size
    steps = args.steps or len(shapes.schedule.steps)
    exchanges = Exchanges.of(shapes, size, steps, resolve_dtype(job.config.dtype, device), args.repeats)
    report = CollectivesReport.of(
        exchanges,
        measured_exchanges(job, exchanges),
        model=args.model,
        device=describe_device(device),
        ranks=args.ranks,
        chunk_ms=args.chunk_ms,
    )
    print(as_text(report))
    write_json(args.json, report)
    return 0


def _targets(args: argparse.Namespace) -> int:
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.pipeline import Load
    from lingbot_rt.bench.targets import TargetsReport, as_text, measure_targets
    from lingbot_rt.config import ServeConfig

    load = Load(
        size=parse_size(args.size) if args.size else None,
        sink_frames=args.sink,
        window_frames=args.window,
        chunks=args.chunks,
    )
    reports: list[TargetsReport] = []

    def told(report: TargetsReport) -> None:
        # Written each time: what is measured is kept, whatever the next case does to the process.
        write_json(args.json, report)
        print(f"{report.rows[-1].case}: done after {report.minutes:.1f} minutes", file=sys.stderr, flush=True)
        reports[:] = [report]

    config = ServeConfig(model_path=args.model, **given_options(args))
    measure_targets(config, load, args.far, told)
    print(as_text(reports[0]))
    return 1 if any(row.error for row in reports[0].rows) else 0


def _transport(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.transport import as_text, measure_transport

    with tqdm(total=2 * len(OUTPUT_FORMATS), unit="way", disable=None) as bar:
        report = measure_transport(parse_size(args.size), args.frames, bar.update)
    print(as_text(report))
    write_json(args.json, report)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.serve import Visit, as_text, model_facts, serve_report, visit
    from lingbot_rt.commands.client import parse_fields, served_size
    from lingbot_rt.commands.walk import DEFAULT_PROMPT, first_picture

    size = parse_size(args.size) if args.size else served_size(args.url, args.api_key)
    init = {
        "prompt": DEFAULT_PROMPT,
        "first_frame": first_picture(args.first_frame, size),
        "size": str(size),
        "fps": args.fps,
        "max_chunks": args.chunks,
        "realtime_output_format": args.format,
    } | parse_fields(args.init)
    plan = Visit(
        url=args.url,
        api_key=args.api_key,
        init=init,
        press_every_s=args.press_every,
        playback_fps=args.playback_fps or args.fps,
        playback_lead_s=args.playback_lead,
    )
    model = model_facts(args.url, args.api_key)
    with tqdm(unit="frame", disable=None) as bar:
        seen = visit(plan, bar.update)
    report = serve_report(plan, model, seen)
    print(as_text(report))
    write_json(args.json, report)
    return 0


def _job(args: argparse.Namespace, num_gpus: int) -> Job:
    """Raises ConfigError for what cannot be."""
    from lingbot_rt.bench.random_model import LINGBOT_WORLD_FAST
    from lingbot_rt.bench.ranks import Job
    from lingbot_rt.config import ServeConfig

    if args.kind == "pipeline" and args.model == LINGBOT_WORLD_FAST and not args.random_weights:
        raise ConfigError(
            f"--model {args.model} names shapes without weights: add --random-weights, or name a folder or a hub id",
            field="model",
        )
    options = given_options(args)
    if num_gpus == 1:
        options.pop("vae_parallel", None)
    config = ServeConfig(model_path=args.model, num_gpus=num_gpus, **options)
    if args.kind == "collectives":
        return Job(config, random_weights=True, exchanges_only=True)
    return Job(config, random_weights=args.random_weights)


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if _count_from_zero(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, rising."""
    counts = tuple(_count(part) for part in text.split(","))
    if list(counts) != sorted(set(counts)):
        raise argparse.ArgumentTypeError(f"{text}: expected rising numbers, such as 1,2,4")
    return counts


def _count_from_zero(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


def _positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value
