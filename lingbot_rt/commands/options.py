"""Command-line options: those made from the fields of ``ServeConfig``, and those that several verbs share.

``ServeConfig`` is the only source of its options' names, types, ranges and help texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

from lingbot_rt.config import ENV_PREFIX, OUTPUT_FORMATS, ServeConfig, flag, load_config, parse_value, value_type
from lingbot_rt.errors import ConfigError
from lingbot_rt.shapes import FrameSize

GROUPS = ("model", "device", "server", "limits")
DEFAULT_URL = "http://127.0.0.1:30000"


def add_config_options(
    parser: argparse.ArgumentParser, groups: Collection[str] = GROUPS, also: Collection[str] = ()
) -> None:
    """Adds --config, the flags of the fields in ``groups`` and the flags of the fields named in ``also``."""
    parser.add_argument("--config", metavar="FILE", help="TOML file that sets these options: model_path = ...")
    sections: dict[str, argparse._ActionsContainer] = {name: parser.add_argument_group(name) for name in groups}
    for field in dataclasses.fields(ServeConfig):
        section = sections.get(field.metadata["group"], parser if field.name in also else None)
        if section is not None:
            _add_option(section, field)


def add_options_named(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds the flags of the fields ``names`` and no others."""
    for field in dataclasses.fields(ServeConfig):
        if field.name in names:
            _add_option(parser, field)


def _add_option(section: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
    optional_value = {"nargs": "?", "const": "true"} if value_type(field) is bool else {}
    section.add_argument(
        flag(field.name),
        metavar=value_form(field),
        default=argparse.SUPPRESS,
        help=describe(field).replace("%", "%%"),
        **optional_value,  # type: ignore[arg-type]
    )


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields whose flags were given. Raises ConfigError for a value of the wrong type."""
    return {
        field.name: parse_value(field, getattr(args, field.name), source=flag(field.name))
        for field in dataclasses.fields(ServeConfig)
        if field.name in args
    }


def config_from(args: argparse.Namespace) -> ServeConfig:
    """The configuration from flags, environment and --config. Raises ConfigError."""
    return load_config(given_options(args), file=args.config)


def value_form(field: dataclasses.Field[Any]) -> str:
    """The placeholder after the flag: ``auto|cuda|cpu``, ``true|false``, ``N``."""
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return {bool: "true|false", int: "N", float: "SECONDS", str: "TEXT"}[value_type(field)]


def describe(field: dataclasses.Field[Any]) -> str:
    """The help text, with range and default."""
    low, high, default = field.metadata["low"], field.metadata["high"], field.default
    notes = [] if low is None else [f"{low} to {high}"]
    if default is not None:
        notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    return field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")


def add_server_options(parser: argparse.ArgumentParser, *, default_url: str | None = DEFAULT_URL) -> None:
    """Adds --url and --api-key. Without ``default_url`` the command can also run in this process."""
    where = f"default: {default_url}" if default_url else "default: run in this process"
    parser.add_argument("--url", default=default_url, help=f"URL of a running server ({where})")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(ENV_PREFIX + "API_KEY"),
        metavar="TEXT",
        help=f"API key of that server (default: the variable {ENV_PREFIX}API_KEY)",
    )


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Adds the server's options, --format and --init."""
    add_server_options(parser)
    parser.add_argument(
        "--format",
        choices=OUTPUT_FORMATS,
        metavar="|".join(OUTPUT_FORMATS),
        help="how the server sends frames (default: the server's setting)",
    )
    parser.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set any other field of the init, for example guidance_scale=2; may be repeated",
    )


def add_size_option(parser: argparse.ArgumentParser, default: FrameSize | None = None) -> None:
    shown = default or "the model's size"
    parser.add_argument(
        "--size", type=frame_size, default=default, metavar="WxH", help=f"frame size in pixels (default: {shown})"
    )


def parse_init_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """``fps=25`` -> {"fps": 25}. A value that is not JSON is taken as text. Raises ConfigError."""
    fields = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--init {assignment!r}: expected FIELD=VALUE", field="init")
        try:
            fields[name] = json.loads(text)
        except ValueError:
            fields[name] = text
    return fields


def frame_size(text: str) -> FrameSize:
    """For argparse: ``832x480``."""
    try:
        return FrameSize.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_int(text: str) -> int:
    """For argparse: a whole number from 1."""
    if non_negative_int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def non_negative_int(text: str) -> int:
    """For argparse: a whole number from 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


def rising_ints(text: str) -> tuple[int, ...]:
    """For argparse: ``1,2,4`` -> (1, 2, 4), each larger than the one before it."""
    counts = tuple(positive_int(part) for part in text.split(","))
    if list(counts) != sorted(set(counts)):
        raise argparse.ArgumentTypeError(f"{text}: expected rising numbers, such as 1,2,4")
    return counts


def positive_float(text: str) -> float:
    """For argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value
