"""``lingbot-rt bench replicas``: its options and its table."""

from __future__ import annotations

import argparse

from lingbot_rt.commands.bench_load import duration
from lingbot_rt.commands.options import non_negative_int, positive_float, rising_ints
from lingbot_rt.commands.output import say


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replicas",
        type=rising_ints,
        default=(1, 2, 4, 8),
        metavar="N[,N...]",
        help="numbers of replicas to compare (default: 1,2,4,8)",
    )
    parser.add_argument(
        "--per-hour", type=positive_float, default=20.0, metavar="N", help="clients that arrive per hour (default: 20)"
    )
    parser.add_argument(
        "--session", type=duration, default=300.0, metavar="TIME", help="mean length of a session (default: 5m)"
    )
    parser.add_argument(
        "--max-waiting",
        type=non_negative_int,
        default=32,
        metavar="N",
        help="clients in line at which further ones are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--for", dest="for_s", type=duration, default=7 * 86400.0, metavar="TIME", help="simulated time (default: 168h)"
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="N", help="of the random clients (default: 0)"
    )


def measure(args: argparse.Namespace) -> int:
    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.replicas import Traffic, as_text, simulate

    traffic = Traffic(
        per_hour=args.per_hour,
        session_s=args.session,
        max_waiting=args.max_waiting,
        hours=args.for_s / 3600,
        seed=args.seed,
    )
    report = simulate(traffic, args.replicas)
    say(as_text(report))
    write_json(args.json, report)
    return 0
