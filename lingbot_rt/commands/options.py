"""Command-line options made from the fields of ``ServeConfig``: one source for names, types, ranges and help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any

from lingbot_rt.config import ServeConfig, flag, load_config, parse_value, value_type

GROUPS = ("model", "device", "server", "limits")


def add_config_options(
    parser: argparse.ArgumentParser, groups: Collection[str] = GROUPS, also: Collection[str] = ()
) -> None:
    """Adds the flags of the fields in ``groups``, those of the fields named in ``also``, and --config."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names: model_path = ...")
    sections: dict[str, argparse._ActionsContainer] = {name: parser.add_argument_group(name) for name in groups}
    for field in dataclasses.fields(ServeConfig):
        section = sections.get(field.metadata["group"], parser if field.name in also else None)
        if section is not None:
            _add_option(section, field)


def add_options_named(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds the flags of the fields ``names`` alone."""
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
    """The fields whose flags were given. Raises ConfigError for a value of another type."""
    return {
        field.name: parse_value(field, getattr(args, field.name), source=flag(field.name))
        for field in dataclasses.fields(ServeConfig)
        if field.name in args
    }


def config_from(args: argparse.Namespace) -> ServeConfig:
    """The configuration that the flags, the environment and the file give. Raises ConfigError."""
    return load_config(given_options(args), file=args.config)


def value_form(field: dataclasses.Field[Any]) -> str:
    """What to write after the flag: ``auto|cuda|cpu``, ``true|false``, ``N``."""
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return {bool: "true|false", int: "N", float: "SECONDS", str: "TEXT"}[value_type(field)]


def describe(field: dataclasses.Field[Any]) -> str:
    """The help with range and default."""
    low, high, default = field.metadata["low"], field.metadata["high"], field.default
    notes = [] if low is None else [f"{low} to {high}"]
    if default is not None:
        notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    return field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
