"""Throws random input at everything that strangers reach, and fails at the first promise that does not hold.

    .venv/bin/python scripts/fuzz.py --minutes 10
    .venv/bin/python scripts/fuzz.py --minutes 10 --seed 7 --target pictures
    .venv/bin/python scripts/fuzz.py --target pictures --seed 7 --case 123

The last line tries one case again. Targets:

- messages    MessagePack in odd forms, cut and spliced: a message, or one line that names what is wrong
- settings    an init of random fields and values: settings that a session runs with, or one such line
- session     events, pauses, chunks and time in any order: each event is answered once, and no queue passes its bound
- connection  several clients at once over sockets that break: the right close, and nothing is left behind
- worlds      damaged and strange files of saved worlds: a session that goes on, or one such line
- pictures    mutated files of every format: a picture or one such line, in time and memory for its pixels

Everything runs in this process, without sockets, a model or a GPU. A case follows from its seed, target and number. A
failure prints all three and the command that repeats it.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.fuzz_targets import connection, messages, pictures, session, settings, worlds  # noqa: E402

HANG_S = 300.0
"""A case that takes longer hangs: the process says which one it is, and ends."""

TARGETS: dict[str, Callable[[Random], str]] = {
    "messages": messages.try_case,
    "settings": settings.try_case,
    "session": session.try_case,
    "connection": connection.try_case,
    "pictures": pictures.try_case,
    "worlds": worlds.try_case,
}
"""Each makes a case of the random numbers, tries it, and says in a word how it ended. Raises what must not happen."""


class Failed(Exception):
    """A case broke a promise. The text ends with the command that repeats it."""


@dataclass
class Tally:
    """What was tried of one target."""

    cases: int = 0
    seconds: float = 0.0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        ends = ", ".join(f"{end} {count}" for end, count in self.ends.most_common(10))
        return f"{self.cases:>8} cases in {self.seconds:4.0f} s: {ends}"


def command(target: str, seed: int, case: int) -> str:
    return shlex.join(["python", "scripts/fuzz.py", "--target", target, "--seed", str(seed), "--case", str(case)])


def try_case(target: str, seed: int, case: int, tally: Tally) -> None:
    """Raises Failed."""
    begun = time.monotonic()
    try:
        tally.ends[TARGETS[target](Random(f"{seed}/{target}/{case}"))] += 1
    except Exception as error:
        what = "".join(traceback.format_exception(error))
        raise Failed(f"{what}\n{target}, seed {seed}, case {case}. Again:\n  {command(target, seed, case)}") from None
    tally.cases += 1
    tally.seconds += time.monotonic() - begun


def fuzz(targets: list[str], seed: int, seconds: float) -> dict[str, Tally]:
    """Tries cases of all targets, from 0 on, in equal shares of the time; at least one of each. Raises Failed."""
    tallies = {target: Tally() for target in targets}
    end, watched = time.monotonic() + seconds, [("", 0)]
    threading.Thread(target=_end_a_hang, args=(seed, watched), daemon=True).start()
    while time.monotonic() < end or not all(tally.cases for tally in tallies.values()):
        target = min(tallies, key=lambda name: tallies[name].seconds)
        watched[0] = (target, tallies[target].cases)
        try_case(target, seed, tallies[target].cases, tallies[target])
    watched[0] = ("", 0)
    return tallies


def _end_a_hang(seed: int, watched: list[tuple[str, int]]) -> None:
    seen = None
    while True:
        now = watched[0]
        if now == seen and now[0]:
            print(f"{now[0]} hangs. Again:\n  {command(now[0], seed, now[1])}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            os._exit(1)
        seen = now
        time.sleep(HANG_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, all targets together (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases (default: 0)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given several times (default: all)")
    parser.add_argument("--case", type=int, help="only this case of each target")
    args = parser.parse_args()
    targets = args.target or list(TARGETS)
    try:
        if args.case is None:
            tallies = fuzz(targets, args.seed, 60 * args.minutes)
        else:
            tallies = {target: Tally() for target in targets}
            for target, tally in tallies.items():
                try_case(target, args.seed, args.case, tally)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    for target, tally in tallies.items():
        print(f"{target:<10} {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
