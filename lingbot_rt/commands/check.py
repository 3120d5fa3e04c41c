"""``lingbot-rt check``: keep the frames of a build as ground truth, compare later builds with them."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lingbot_rt.commands.options import add_config_options, config_from
from lingbot_rt.commands.progress import StageBars
from lingbot_rt.config import ServeConfig

if TYPE_CHECKING:
    from lingbot_rt.consistency.cases import Case
    from lingbot_rt.consistency.ground_truth import PlayedCase
    from lingbot_rt.server.engine_port import EnginePort

DIFFERS = 1
"""Exit code when a case failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    record = actions.add_parser("record", help="play the cases and keep their frames as ground truth")
    record.add_argument("--out", metavar="DIR", required=True, help="where the ground truth goes")
    run_ = actions.add_parser("run", help="play the cases and compare them with their ground truth")
    run_.add_argument("--gt", metavar="DIR", required=True, help="ground truth made by `check record`")
    run_.add_argument("--report", metavar="DIR", help="write report.json and a page with the pictures that differ")
    run_.add_argument("--json", action="store_true", help="print the verdicts as JSON instead of a table")
    run_.add_argument("--no-latency", action="store_true", help="compare pictures only (another machine, a loaded one)")
    for action in (record, run_):
        action.add_argument("cases", metavar="CASES", help="case file (TOML)")
        action.add_argument("--only", metavar="NAME", action="append", help="play only this case; may be repeated")
        action.add_argument("--url", help="play on a running server (default: in this process)")
        action.add_argument("--api-key", metavar="KEY", help="of that server")
        add_config_options(action, ("model", "device"))


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.consistency.cases import load_cases
    from lingbot_rt.errors import ConfigError

    cases = load_cases(Path(args.cases))
    if args.only:
        unknown = set(args.only) - {case.name for case in cases}
        if unknown:
            raise ConfigError(f"--only {', '.join(sorted(unknown))}: {args.cases} has no such case", field="only")
        cases = [case for case in cases if case.name in args.only]
    return asyncio.run(_record(args, cases) if args.action == "record" else _compare(args, cases))


async def _record(args: argparse.Namespace, cases: list[Case]) -> int:
    from lingbot_rt.consistency.ground_truth import write_truth

    async for case, played in _play(args, cases):
        await asyncio.to_thread(write_truth, Path(args.out), case, played)
    print(f"{len(cases)} cases kept in {args.out}")
    return 0


async def _compare(args: argparse.Namespace, cases: list[Case]) -> int:
    from lingbot_rt.consistency.guard import compare
    from lingbot_rt.consistency.report import as_json, table, write_report

    reports = [
        compare(case, played, Path(args.gt), guard_latency=not args.no_latency)
        async for case, played in _play(args, cases)
    ]
    print(json.dumps(as_json(reports), indent=1) if args.json else table(reports))
    if args.report:
        index = await asyncio.to_thread(write_report, Path(args.report), reports)
        if not args.json:
            print(index)
    return 0 if all(report.passed for report in reports) else DIFFERS


async def _play(args: argparse.Namespace, cases: list[Case]) -> AsyncIterator[tuple[Case, PlayedCase]]:
    from lingbot_rt.consistency.play import play_in_process, play_over_wire, scripted_init

    bar = tqdm(cases, unit="case", disable=None)
    if args.url:
        for case in bar:
            init = scripted_init(case.init, case.events, case.chunks)
            yield case, await asyncio.to_thread(play_over_wire, args.url, init, args.api_key)
        return
    config = config_from(args)
    async with started_engine(config) as engine:
        for case in bar:
            yield case, await play_in_process(engine, config, scripted_init(case.init, case.events, case.chunks))


@asynccontextmanager
async def started_engine(config: ServeConfig) -> AsyncIterator[EnginePort]:
    """An engine that is ready, with bars while it loads; stopped at the end."""
    from lingbot_rt.engine.engine import Engine

    engine = Engine(config)
    try:
        with StageBars() as bars:
            await bars.follow(engine, asyncio.ensure_future(engine.start()))
        yield engine
    finally:
        await engine.stop()
