"""``lingbot-rt bench load``: its options, its bar and its table."""

from __future__ import annotations

import argparse
import re

from lingbot_rt.commands.options import (
    add_client_options,
    add_size_option,
    api_key_from,
    argument,
    positive_int,
    whole_number,
)
from lingbot_rt.commands.output import say
from lingbot_rt.commands.session_options import (
    DEFAULT_PROMPT,
    add_first_frame_option,
    checked_init,
    first_frame_bytes,
    init_fields,
)
from lingbot_rt.errors import quoted

MAX_CLIENTS = 10_000
"""Clients that one process can be."""

LONGEST_S = 7 * 86400.0
"""Longest load."""

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", re.ASCII)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@argument
def duration(text: str) -> float:
    """For argparse: ``90``, ``60s``, ``5m`` or ``2h`` -> seconds."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"{quoted(text)}: expected a time such as 60s, 5m or 2h, up to {LONGEST_S / 86400:g} days")
    return seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    add_client_options(parser)
    add_size_option(parser)
    add_first_frame_option(parser)
    parser.add_argument(
        "--sessions",
        type=whole_number(1, MAX_CLIENTS),
        default=4,
        metavar="N",
        help="clients at once (default: %(default)s)",
    )
    parser.add_argument(
        "--for",
        dest="for_s",
        type=duration,
        default=60.0,
        metavar="TIME",
        help="how long, such as 60s, 5m or 2h (default: 60s)",
    )
    parser.add_argument(
        "--chunks",
        type=positive_int,
        default=20,
        metavar="N",
        help="chunks of each session, after which its client asks for another one (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, metavar="N", help="sessions of each client (default: as many as the time allows)"
    )


def measure(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lingbot_rt.bench.figures import write_json
    from lingbot_rt.bench.load import Load, LoadSpec, as_text, load_report
    from lingbot_rt.bench.serve import model_facts
    from lingbot_rt.client.server_info import served_size

    api_key = api_key_from(args)
    options = {
        "prompt": DEFAULT_PROMPT,
        "first_frame": first_frame_bytes(args.first_frame),
        "max_chunks": args.chunks,
        "realtime_output_format": args.format,
        "protocol_extensions": ["queue", "session"],
    }
    extra = init_fields(args.init)
    checked_init(options, extra)  # before the server is asked
    size = args.size or served_size(args.url, api_key)
    init, _ = checked_init(options | {"size": None if size is None else str(size)}, extra)
    spec = LoadSpec(
        url=args.url, api_key=api_key, init=init, clients=args.sessions, for_s=args.for_s, rounds=args.rounds
    )
    model = model_facts(args.url, api_key)
    load = Load(spec)
    with tqdm(total=round(args.for_s), unit="s", disable=None) as bar:

        def show(took_s: float, state: str) -> None:
            bar.set_postfix_str(state, refresh=False)
            bar.update(round(took_s) - bar.n)

        load.run(show)
    report = load_report(spec, model, load)
    say(as_text(report))
    write_json(args.json, report)
    return 0 if report.sessions else 1
