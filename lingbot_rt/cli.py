"""``lingbot-rt VERB``: parsing only. Each verb's options and work are in ``commands/``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from lingbot_rt import __version__
from lingbot_rt.commands import BAD_USAGE, FAILED, INTERRUPTED, READER_GONE, VERBS, exit_code
from lingbot_rt.commands.output import complain, flush_output, one_message, prepare_output
from lingbot_rt.errors import LingbotError, ReaderGone, reason_of

_BARE = ((), ("bench",), ("check",))
"""Command lines that name no work. They show the help."""


class Parser(argparse.ArgumentParser):
    """Prints one line for a wrong command line. argparse alone prints the whole usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USAGE, f"{self.prog}: {one_message(message)} (see {self.prog} --help)\n")


def build_parser(verb: str | None) -> Parser:
    """The parser with the options of ``verb``. It imports no other verb's module, so that --help is fast."""
    parser = Parser(prog="lingbot-rt", description="Walk through a world made from a picture and a sentence.")
    parser.add_argument("--version", action="version", version=f"lingbot-rt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        description = summary[0].upper() + summary[1:] + "."
        options = verbs.add_parser(name, help=summary, description=description, allow_abbrev=False)
        if name == verb:
            module = importlib.import_module(f"lingbot_rt.commands.{name}")
            module.add_arguments(options)
            options.set_defaults(run=module.run)
    return parser


def joined(words: Sequence[str]) -> list[str]:
    """``--keys -*2`` -> ``--keys=-*2``: argparse alone takes a value that begins with a dash for an option."""
    result: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return [*result, *words[place:]]
        option = words[place - 1] if place else ""
        is_value = word.startswith("-") and not word.startswith("--") and word not in ("-", "-h")
        if is_value and option.startswith("--") and "=" not in option:
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 success, 1 failure, 2 wrong command line or configuration, 130 Ctrl-C, 141 nobody reads the output.

    Raises SystemExit, as argparse does, for --help and for a wrong command line.
    """
    prepare_output()
    words = joined(sys.argv[1:] if arguments is None else arguments)
    if tuple(words) in _BARE:
        words.append("--help")
    args = argparse.Namespace()
    try:
        try:
            parser = build_parser(next((word for word in words if not word.startswith("-")), None))
            _, unknown = parser.parse_known_args(words, args)
            if unknown:
                Parser(prog=f"{parser.prog} {args.verb}").error(f"unrecognized arguments: {' '.join(unknown)}")
            return args.run(args)
        finally:
            flush_output()
    except ReaderGone:
        return READER_GONE
    except LingbotError as error:
        complain(error.described + _set_by(args, error))
        return exit_code(error)
    except OSError as error:
        complain(reason_of(error) if error.filename is None else f"{error.filename}: {reason_of(error)}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _set_by(args: argparse.Namespace, error: LingbotError) -> str:
    """Where the value of the error's option was set, unless the message says so already."""
    source = getattr(args, "sources", {}).get(error.field, "")
    return f" (set by {source})" if source and source not in error.described else ""
