"""Command-line options: those made from the fields of ``ServeConfig``, and those that several verbs share.

``ServeConfig`` is the only source of its options' names, types, ranges and help texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from lingbot_rt.commands.output import complain
from lingbot_rt.commands.reference_flags import translate
from lingbot_rt.config import (
    ENV_PREFIX,
    OUTPUT_FORMATS,
    ServeConfig,
    checked_value,
    parse_value,
    value_type,
)
from lingbot_rt.config_sources import gather_settings, unread_variables
from lingbot_rt.config_values import environment_value, flag, path_value, text_value
from lingbot_rt.errors import ConfigError, quoted, reason_of
from lingbot_rt.shapes import SIZE_MULTIPLE, FrameSize

GROUPS = ("model", "device", "server", "limits")
DEFAULT_URL = "http://127.0.0.1:30000"
KEY_VARIABLE = ENV_PREFIX + "API_KEY"
VIDEO_ENDINGS = (".mp4", ".webp", ".gif")
"""Endings of the files that frames are saved in. Any other place for frames is a folder."""

FRAME_NAME = re.compile(r"frame_\d{5,}\.png")
"""A file that a command wrote into the folder of --out."""

_FRAMES_EXPECTED = f"expected a folder, or a name ending in {', '.join(VIDEO_ENDINGS[:-1])} or {VIDEO_ENDINGS[-1]}"


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
    """The configuration from flags, environment and --config. Raises ConfigError.

    Takes the flags of the reference's server as well. Names on standard error those without effect, and the variables
    with the project's prefix that nothing reads. Sets ``args.sources``: where
    each field was set.
    """
    unread = unread_variables()
    if unread:
        named = (f"{name} (the nearest is {nearest})" if nearest else name for name, nearest in unread.items())
        complain(f"warning: nothing reads {', '.join(named)}")
    translation = translate(args, given_options(args))
    for warning in translation.warnings:
        complain(f"warning: {warning}")
    settings = gather_settings(translation.fields, file=args.config)
    args.sources = {name: setting.source for name, setting in settings.items()}
    return ServeConfig(**{name: setting.value for name, setting in settings.items()})


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
    parser.add_argument("--url", type=server_url, default=default_url, help=f"URL of a running server ({where})")
    parser.add_argument(
        "--api-key", metavar="TEXT", help=f"API key of that server (default: the variable {KEY_VARIABLE})"
    )


def api_key_from(args: argparse.Namespace) -> str | None:
    """The key of --api-key, else of the environment. Raises ConfigError for one that no client can send."""
    field = next(field for field in dataclasses.fields(ServeConfig) if field.name == "api_key")
    if args.api_key is not None:
        return checked_value(field, args.api_key, source=flag("api_key"))
    return checked_value(field, environment_value(KEY_VARIABLE, os.environ), source=KEY_VARIABLE)


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
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ConfigError(f"--init {quoted(assignment)}: expected FIELD=VALUE", field="init")
        try:
            fields[name] = json.loads(text)
        except (ValueError, RecursionError):
            fields[name] = text
    return fields


def argument(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse: its ``type`` from a function that raises ValueError. argparse would hide the message."""

    def checked(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except OSError as error:  # a path that the system does not take
            raise argparse.ArgumentTypeError(f"{quoted(text)}: {reason_of(error)}") from None

    return checked


@argument
def server_url(text: str) -> str:
    """For argparse: the URL of a server."""
    from lingbot_rt.client.address import ServerAddress

    ServerAddress.parse(text)
    return text


@argument
def frame_size(text: str) -> FrameSize:
    """For argparse: ``832x480``."""
    try:
        return FrameSize.parse(text)
    except ValueError:
        raise ValueError(f"{quoted(text)}: expected WIDTHxHEIGHT, such as 832x480") from None


def require_session_size(size: FrameSize | None) -> None:
    """Raises ConfigError for a size that no session can have."""
    from lingbot_rt.session.settings import MIN_SIDE

    if size is not None and (not size.is_whole_tokens or min(size.width, size.height) < MIN_SIDE):
        nearest = size.nearest_valid(MIN_SIDE, 2 * max(size.pixels, MIN_SIDE**2))
        raise ConfigError(
            f"--size {size}: expected multiples of {SIZE_MULTIPLE}, at least {MIN_SIDE} each; nearest valid {nearest}",
            field="size",
        )


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """For argparse: a whole number from ``low`` to ``high``."""
    expected = f"{low} or more" if high is None else f"{low} to {high}"

    @argument
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{quoted(text)}: expected a whole number, {expected}") from None
        if value < low or (high is not None and value > high):
            raise ValueError(f"{quoted(text)}: expected {expected}")
        return value

    return parse


positive_int = whole_number(1)
non_negative_int = whole_number(0)


@argument
def rising_ints(text: str) -> tuple[int, ...]:
    """For argparse: ``1,2,4`` -> (1, 2, 4), each larger than the one before it."""
    counts = tuple(positive_int(part) for part in text.split(","))
    if list(counts) != sorted(set(counts)):
        raise ValueError(f"{quoted(text)}: expected rising numbers, such as 1,2,4")
    return counts


def real_number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """For argparse: a finite number from ``low`` to ``high``; with ``above`` it must be greater than ``low``."""
    start = f"above {low:g}" if above else f"from {low:g}"
    expected = f"a number {start}" + ("" if high == math.inf else f" to {high:g}")

    @argument
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value) or (above and value == low):
            raise ValueError(f"{quoted(text)}: expected {expected}")
        return value

    return parse


positive_float = real_number(0, above=True)


plain_text = argument(text_value)
"""For argparse: a text that is not empty and has no control characters."""

path_text = argument(path_value)
"""For argparse: a path with ``~`` expanded."""


def require_existing(option: str, name: str | None, *, folder: bool = False) -> None:
    """Raises ConfigError if the file or folder ``name``, given as ``option``, does not exist."""
    if name is not None and not os.path.exists(name):
        raise ConfigError(f"{option} {quoted(name)}: there is no such file or folder")
    if folder and name is not None and not os.path.isdir(name):
        raise ConfigError(f"{option} {quoted(name)}: expected a folder, but it is a file")


@argument
def output_folder(text: str) -> str:
    """For argparse: a folder to write, which is made when the first file is written."""
    folder = Path(path_value(text))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{quoted(str(folder))}: expected a folder, but it is a file")
    _require_writable(folder)
    return str(folder)


@argument
def output_file(text: str) -> str:
    """For argparse: a file to write, in a folder that exists."""
    file = Path(path_value(text))
    if not file.parent.exists():
        raise ValueError(f"{quoted(str(file))}: there is no folder {file.parent}")
    return _file_to_write(file)


def add_frames_option(parser: argparse.ArgumentParser, option: str, meaning: str, default: str | None = None) -> None:
    """Adds ``option``, the place where frames are saved, and --overwrite."""
    parser.add_argument(
        option,
        type=output_frames,
        default=default,
        metavar="PATH",
        help=f"{meaning}: a name ending in {', '.join(VIDEO_ENDINGS[:-1])} or {VIDEO_ENDINGS[-1]} for a video, another "
        f"one for a folder of PNGs (default: {default or 'save nothing'})",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"remove the frames of an earlier run from the folder of {option} (default: refuse such a folder)",
    )


@argument
def output_frames(text: str) -> str:
    """For argparse: where frames are saved, in the form that ``frames_are_files`` tells apart."""
    path = path_value(text)
    target = Path(path)
    shown = quoted(str(target))
    is_folder = frames_are_files(path)
    if not is_folder and target.suffix.lower() in VIDEO_ENDINGS:
        return _file_to_write(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{shown}: it is a file; {_FRAMES_EXPECTED}")
    if not is_folder:
        raise ValueError(f"{shown}: unknown ending {target.suffix}; {_FRAMES_EXPECTED}; a folder's name may end in /")
    _require_writable(target)
    return path


def frames_are_files(path: str) -> bool:
    """Whether frames go into the folder ``path``: it has no ending, it exists, or the name ends in a slash."""
    target = Path(path)
    if path.endswith(("/", os.sep)) or not target.suffix:
        return True
    return target.is_dir() and target.suffix.lower() not in VIDEO_ENDINGS


def require_no_frames(option: str, path: str | None, *, overwrite: bool) -> None:
    """Raises ConfigError if the folder ``path``, given as ``option``, has frames and may not be emptied of them."""
    if path is None or overwrite or not frames_are_files(path) or not os.path.isdir(path):
        return
    if any(FRAME_NAME.fullmatch(name) for name in os.listdir(path)):
        raise ConfigError(
            f"{option} {quoted(path)}: it has the frames of an earlier run; name another folder, or add --overwrite",
            field=option.removeprefix("--"),
        )


def _file_to_write(file: Path) -> str:
    if file.is_dir():
        raise ValueError(f"{quoted(str(file))}: expected the name of a file, but it is a folder")
    _require_writable(file)
    return str(file)


def _require_writable(target: Path) -> None:
    """Raises ValueError if ``target`` cannot be written, or made in the nearest folder above it that exists."""
    above = target
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if above != target and not above.is_dir():
        raise ValueError(f"{quoted(str(target))}: {above} is a file, expected a folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{quoted(str(target))}: {above} cannot be written")
