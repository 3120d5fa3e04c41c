"""Options of ``client`` and ``generate`` for kept worlds: going on from one, and saving one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lingbot_rt.client.kept import is_token
from lingbot_rt.commands.options import argument, output_file, path_text
from lingbot_rt.commands.session_options import DEFAULT_PROMPT, DEFAULTS, script_of
from lingbot_rt.errors import ConfigError, InvalidInit, quoted, reason_of
from lingbot_rt.session.world_file import WorldFile, read_world
from lingbot_rt.shapes import latent_frames_for, pixel_frames_of_chunk

_OWN = ("first_frame", "size", "num_frames", "steps", "seed", "fps")
"""Options of a session that a kept world has itself."""


@dataclass(frozen=True, slots=True)
class KeptWorld:
    """The world that a walk goes on from. Of a token only the server knows more."""

    resume: str | bytes  # a token, or the bytes of a file
    file: WorldFile | None = None
    num_frames: int = 9  # of its first chunk, as in its init
    fps: float = 16.0

    @property
    def latent_frames(self) -> int:
        return latent_frames_for(self.num_frames)

    def frames(self, chunks: int) -> int:
        """Pixel frames of the next ``chunks`` chunks, before interpolation."""
        first = 1 if self.file is None else self.file.chunk_index
        return sum(pixel_frames_of_chunk(first + number, self.latent_frames) for number in range(chunks))


@argument
def _token_or_path(text: str) -> str:
    if not is_token(text) and not os.path.exists(text):
        raise ValueError(f"{quoted(text)}: there is no such file, expected a saved world or the token of a session")
    return text


def add_resume_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=_token_or_path,
        metavar="FILE|TOKEN",
        help="go on with a saved world, or with a session whose token is known (default: begin a new one)",
    )


def add_from_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="from_world",
        type=path_text,
        metavar="FILE",
        help="go on from a saved world (default: begin a new one)",
    )


def add_save_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save",
        type=output_file,
        metavar="FILE",
        help="save the world at the end of the walk; --resume and generate --from go on from it (default: do not)",
    )


def kept_world(option: str, given: str | None, args: argparse.Namespace) -> KeptWorld | None:
    """The world that ``option`` names; None without it.

    Raises ConfigError for a file that is no saved world, and for other options that it decides itself.
    """
    if given is None:
        return None
    for name in _OWN:
        if getattr(args, name) != DEFAULTS.get(name):
            own = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{own}: expected nothing beside {option}: a kept world has its own", field=name)
    if option == "--resume" and is_token(given):
        return KeptWorld(given)
    try:
        with open(given, "rb") as source:
            data = source.read()
        file = read_world(data)
    except OSError as error:
        raise ConfigError(f"{option} {quoted(given)}: {reason_of(error)}", field=option.lstrip("-")) from None
    except InvalidInit as error:
        raise ConfigError(f"{option} {quoted(given)}: {error}", field=option.lstrip("-")) from None
    return KeptWorld(data, file, *_timing(file))


def events_of(args: argparse.Namespace) -> tuple[list[tuple[str, Any]], Sequence[Any]]:
    """Kinds and payloads of the events that walk on in a kept world, and its moves, one per latent frame.

    A prompt is sent only if one is named; keys that are pressed live are not sent.
    """
    events = prompts_of(args)
    conditions, moves = script_of(args)
    for kind, payload in conditions.items():
        # A path goes on from where the camera is.
        events.append((kind, payload | {"anchor": "camera"} if kind == "camera_poses" else payload))
    return events, moves


def prompts_of(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The event of the prompt that a kept world goes on under, if one is named."""
    return [] if args.prompt == DEFAULT_PROMPT else [("prompt", args.prompt)]


def _timing(file: WorldFile) -> tuple[int, float]:
    """num_frames and fps of the init in the file, or the wire's defaults. The server checks the whole of it."""
    try:
        init = json.loads(file.about)["init"]
        return int(init.get("num_frames", 9)), float(init.get("fps", 16.0))
    except (ValueError, KeyError, TypeError, AttributeError):
        return 9, 16.0
