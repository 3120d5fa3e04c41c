"""``lingbot-rt check``: keep the frames of a build as ground truth, compare later builds with them."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from tqdm import tqdm

from lingbot_rt.commands.player import DIFFERS, add_player_options, open_player

if TYPE_CHECKING:
    from lingbot_rt.regression.cases import Case
    from lingbot_rt.regression.play import Origin, PlayedChunk

Result = TypeVar("Result", covariant=True)


class Taker(Protocol[Result]):
    """Takes the chunks of a case in order."""

    def add(self, chunk: PlayedChunk) -> None: ...

    def finish(self, origin: Origin) -> Result: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    record = actions.add_parser("record", help="play the cases and keep their frames as ground truth")
    record.add_argument("--out", metavar="DIR", required=True, help="where the ground truth goes")
    run_ = actions.add_parser("run", help="play the cases and compare them with their ground truth")
    run_.add_argument("--gt", metavar="DIR", required=True, help="ground truth made by `check record`")
    run_.add_argument("--report", metavar="DIR", help="write report.json and a page with the pictures that differ")
    run_.add_argument("--json", action="store_true", help="print the verdicts as JSON instead of a table")
    run_.add_argument("--no-latency", action="store_true", help="compare pictures only, as on a machine under load")
    for action in (record, run_):
        action.add_argument("cases", metavar="CASES", help="case file (TOML)")
        action.add_argument("--only", metavar="NAME", action="append", help="play only this case; may be repeated")
        add_player_options(action)


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.errors import ConfigError
    from lingbot_rt.regression.cases import load_cases

    cases = load_cases(Path(args.cases))
    if args.only:
        unknown = set(args.only) - {case.name for case in cases}
        if unknown:
            raise ConfigError(f"--only {', '.join(sorted(unknown))}: {args.cases} has no such case", field="only")
        cases = [case for case in cases if case.name in args.only]
    return _record(args, cases) if args.action == "record" else _compare(args, cases)


def _record(args: argparse.Namespace, cases: list[Case]) -> int:
    from lingbot_rt.regression.ground_truth import TruthWriter

    out = Path(args.out)
    asyncio.run(_play(args, cases, lambda case: TruthWriter(out, case)))
    print(f"{len(cases)} cases kept in {out}")
    return 0


def _compare(args: argparse.Namespace, cases: list[Case]) -> int:
    from lingbot_rt.regression.compare import Comparison
    from lingbot_rt.regression.report import as_json, table, write_report

    def comparison(case: Case) -> Comparison:
        return Comparison(case, Path(args.gt), guard_latency=not args.no_latency)

    reports = asyncio.run(_play(args, cases, comparison))
    print(json.dumps(as_json(reports), indent=1) if args.json else table(reports))
    if args.report:
        index = write_report(Path(args.report), reports)
        if not args.json:
            print(index)
    return 0 if all(report.passed for report in reports) else DIFFERS


async def _play(args: argparse.Namespace, cases: list[Case], taker_of: Callable[[Case], Taker[Result]]) -> list[Result]:
    """Every case on one player, each chunk given away as it comes."""
    from lingbot_rt.regression.play import scripted_init

    takers = [taker_of(case) for case in cases]  # before anything slow starts: a truth may be missing
    results = []
    async with open_player(args) as player:
        with tqdm(total=sum(case.chunks for case in cases), unit="chunk", disable=None) as bar:
            for case, taker in zip(cases, takers, strict=True):
                bar.set_description(case.name)
                async for chunk in player.play(scripted_init(case.init, case.events, case.chunks)):
                    await asyncio.to_thread(taker.add, chunk)
                    bar.update()
                results.append(taker.finish(player.origin))
    return results
