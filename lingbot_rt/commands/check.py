"""``lingbot-rt check``: records the frames of a build as ground truth and compares later builds with them."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from tqdm import tqdm

from lingbot_rt.commands import FAILED
from lingbot_rt.commands.local_engine import add_runner_options, open_runner
from lingbot_rt.commands.options import output_folder, path_text, require_existing
from lingbot_rt.commands.output import say
from lingbot_rt.errors import ConfigError

if TYPE_CHECKING:
    from lingbot_rt.regression.cases import Case
    from lingbot_rt.regression.check import CaseCheck
    from lingbot_rt.regression.session_runner import ChunkOutput, Origin

Result = TypeVar("Result", covariant=True)


class ChunkConsumer(Protocol[Result]):
    """Takes the chunks of one case in order: a GroundTruthWriter or a CaseCheck."""

    def add(self, chunk: ChunkOutput) -> None: ...

    def finish(self, origin: Origin) -> Result: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = "run the cases and save their frames as ground truth"
    record = actions.add_parser("record", help=summary, description=f"{summary.capitalize()}.")
    record.add_argument("--out", type=output_folder, metavar="DIR", required=True, help="folder for the ground truth")
    summary = "run the cases and compare them with their ground truth"
    run_ = actions.add_parser("run", help=summary, description=f"{summary.capitalize()}.")
    run_.add_argument("--gt", type=path_text, metavar="DIR", required=True, help="ground truth made by `check record`")
    run_.add_argument(
        "--report",
        type=output_folder,
        metavar="DIR",
        help="write report.json and an HTML page that shows the worst differences",
    )
    run_.add_argument("--json", action="store_true", help="print JSON instead of a table")
    run_.add_argument(
        "--no-latency", action="store_true", help="do not compare times and sizes; use it on a busy machine"
    )
    for action in (record, run_):
        action.add_argument("cases", type=path_text, metavar="CASES", help="case file (TOML)")
        action.add_argument("--only", metavar="NAME", action="append", help="run only this case; may be repeated")
        add_runner_options(action)


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.regression.cases import load_cases

    cases = load_cases(Path(args.cases))
    if args.only:
        unknown = set(args.only) - {case.name for case in cases}
        if unknown:
            names = ", ".join(case.name for case in cases)
            raise ConfigError(
                f"--only {', '.join(sorted(unknown))}: {args.cases} has no such case; it has {names}", field="only"
            )
        cases = [case for case in cases if case.name in args.only]
    return _record(args, cases) if args.action == "record" else _check(args, cases)


def _record(args: argparse.Namespace, cases: list[Case]) -> int:
    from lingbot_rt.regression.ground_truth import GroundTruthWriter

    out = Path(args.out)
    asyncio.run(_run_cases(args, cases, lambda case: GroundTruthWriter(out, case)))
    say(f"{len(cases)} cases saved in {out}")
    return 0


def _check(args: argparse.Namespace, cases: list[Case]) -> int:
    from lingbot_rt.regression.check import CaseCheck
    from lingbot_rt.regression.report import as_json, table, write_report

    require_existing("--gt", args.gt, folder=True)

    def check(case: Case) -> CaseCheck:
        return CaseCheck(case, Path(args.gt), check_latency=not args.no_latency)

    reports = asyncio.run(_run_cases(args, cases, check))
    say(json.dumps(as_json(reports), indent=1) if args.json else table(reports))
    if args.report:
        index = write_report(Path(args.report), reports)
        if not args.json:
            say(str(index))
    return 0 if all(report.passed for report in reports) else FAILED


async def _run_cases(
    args: argparse.Namespace, cases: list[Case], make_consumer: Callable[[Case], ChunkConsumer[Result]]
) -> list[Result]:
    """Runs every case on one engine or server. Each case's consumer gets its chunks one by one."""
    from lingbot_rt.regression.session_runner import scripted_init

    consumers = [make_consumer(case) for case in cases]  # first, because ground truth may be missing
    results = []
    async with open_runner(args) as runner:
        with tqdm(total=sum(case.chunks for case in cases), unit="chunk", disable=None) as bar:
            for case, consumer in zip(cases, consumers, strict=True):
                bar.set_description(case.name)
                # Ground truth is of sessions in one piece: those that are saved and go on must equal them.
                reopen = case.reopen_before if args.action == "run" else ()
                async for chunk in runner.run(scripted_init(case.init, case.events, case.chunks), reopen):
                    await asyncio.to_thread(consumer.add, chunk)
                    bar.update()
                results.append(consumer.finish(runner.origin))
    return results
