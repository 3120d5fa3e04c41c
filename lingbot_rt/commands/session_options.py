"""Options of a scripted session, shared by ``client`` and ``generate``: its keys, its first frame, its length."""

from __future__ import annotations

import argparse
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from lingbot_rt.commands.options import (
    add_size_option,
    argument,
    output_frames,
    parse_init_fields,
    path_text,
    positive_int,
    real_number,
    whole_number,
)
from lingbot_rt.commands.output import complain
from lingbot_rt.errors import ConfigError, RequestError, quoted, reason_of
from lingbot_rt.session.controls import MAX_PENDING, TOKENS, Actions
from lingbot_rt.session.messages import (
    FPS_RANGE,
    MAX_NUM_FRAMES,
    MAX_PROMPT_CHARACTERS,
    STEPS_RANGE,
    Init,
    decode,
    shown,
)
from lingbot_rt.shapes import FrameSize

DEFAULT_PROMPT = "A quiet street in soft morning light, stable camera motion."
DEFAULT_KEYS = "w*12,l*6,w*6"

_PACKAGE = Path(__file__).resolve().parents[1]
_PRESET_FOLDERS = (_PACKAGE / "webui" / "presets", _PACKAGE.parent / "webui" / "presets")  # in a wheel, in a checkout
_KEYS_STEP = re.compile(rf"([{''.join(TOKENS)}]+|-)(?:\*(\d{{1,6}}))?")


_NO_FIELDS = ("type", "script", "url", "api_key", "self")  # of every message, and arguments of the client's ``connect``


def add_session_options(parser: argparse.ArgumentParser, *, default_out: str | None = None) -> None:
    """Without ``default_out`` the frames are saved only if --out is given."""
    parser.add_argument(
        "--prompt",
        type=prompt_text,
        default=DEFAULT_PROMPT,
        metavar="TEXT",
        help="describes the world (default: a quiet street)",
    )
    add_first_frame_option(parser)
    add_size_option(parser)
    parser.add_argument(
        "--keys",
        default=DEFAULT_KEYS,
        metavar="KEYS",
        help="comma-separated keys: w a s d move, i j k l look, - is no key; *N holds them for N latent frames "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--chunks", type=positive_int, metavar="N", help="chunks to generate (default: as many as --keys fills)"
    )
    parser.add_argument(
        "--num-frames",
        type=whole_number(1, MAX_NUM_FRAMES),
        default=9,
        metavar="N",
        help=f"pixel frames of the first chunk, 1 to {MAX_NUM_FRAMES} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=whole_number(*STEPS_RANGE), metavar="N", help="denoise steps per chunk (default: the model's)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**63 - 1), default=42, metavar="N", help="seed of the noise (default: 42)"
    )
    parser.add_argument(
        "--fps",
        type=real_number(*FPS_RANGE),
        default=16.0,
        metavar="N",
        help="playback rate in frames/s (default: 16)",
    )
    parser.add_argument(
        "--out",
        type=output_frames,
        default=default_out,
        metavar="PATH",
        help="save the frames: NAME.mp4 for a video, another name for a folder of PNGs "
        f"(default: {default_out or 'save nothing'})",
    )


def add_first_frame_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--first-frame",
        type=path_text,
        metavar="FILE",
        help="picture that the session starts from (default: a preset of the page)",
    )


@argument
def prompt_text(text: str) -> str:
    """For argparse: a prompt that a session takes."""
    if not text.strip() or len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{quoted(text)}: expected a sentence of 1 to {MAX_PROMPT_CHARACTERS} characters")
    return text


def init_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """The fields that --init sets. Raises ConfigError for what is no field.

    A server of another version may have more fields, so one that is not known here is sent, with a warning.
    """
    extra = parse_init_fields(assignments)
    for name in extra:
        if name in _NO_FIELDS:
            raise ConfigError(f"--init {quoted(name)}: an init has no such field", field="init")
        if name not in Init.__struct_fields__:
            near = difflib.get_close_matches(name, Init.__struct_fields__, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            complain(f"warning: --init {quoted(name)}: this version has no such field{hint}")
    picture = extra.get("first_frame", "data:")
    if not (isinstance(picture, str) and picture.startswith(("data:", "http://", "https://"))):
        raise ConfigError(
            "--init first_frame: expected a data: or http(s) URL; --first-frame reads a file", field="init"
        )
    for name, value in extra.items():
        try:
            msgspec.msgpack.encode(value)
        except (OverflowError, UnicodeEncodeError, RecursionError):
            raise ConfigError(
                f"--init {name}: {shown(value)}: expected numbers of 64 bits and valid Unicode", field="init"
            ) from None
    return extra


def checked_init(options: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[dict[str, Any], Init]:
    """The fields of an init from the options and from ``init_fields``, which win; and the message that they give.

    Raises ConfigError for what a server would refuse.
    """
    fields = {name: value for name, value in options.items() if value is not None} | dict(extra)
    try:
        message = decode(msgspec.msgpack.encode(fields | {"type": "init"}))
    except RequestError as error:
        where = f"--init {error.field}" if error.field in extra else str(error.field)
        raise ConfigError(f"{where}: {error}", field="init") from None
    assert isinstance(message, Init)
    return fields, message


def parse_keys(text: str) -> Actions:
    """``"w*6,l*3,wa*4"`` -> 13 latent frames: 6 of (w), 3 of (l), 4 of (w, a). Raises ConfigError."""
    actions: list[tuple[str, ...]] = []
    for step in text.split(","):
        match = _KEYS_STEP.fullmatch(step.strip())
        if match is None:
            raise ConfigError(
                f'--keys {quoted(step)}: expected keys of {" ".join(TOKENS)} and a count, such as "w*6,l*3,wa*4,-*2"',
                field="keys",
            )
        keys = () if match[1] == "-" else tuple(dict.fromkeys(match[1]))
        actions += [keys] * int(match[2] or 1)
    return tuple(actions)


def parse_script(text: str) -> Actions:
    """``parse_keys`` for one script. Raises ConfigError above MAX_PENDING latent frames: the session refuses those."""
    actions = parse_keys(text)
    if len(actions) > MAX_PENDING:
        raise ConfigError(f"--keys: {len(actions)} latent frames, at most {MAX_PENDING}", field="keys")
    return actions


def chunks_for(actions: Actions, latent_frames: int, requested: int | None) -> int:
    """``requested``, or as many chunks of ``latent_frames`` as play all ``actions``."""
    return requested if requested is not None else max(-(-len(actions) // latent_frames), 1)


def first_frame_bytes(path: str | None, size: FrameSize) -> bytes:
    """The encoded first frame: the file's bytes, or the page's first preset, or a procedural scene of ``size``.

    Raises ConfigError if the file can't be read.
    """
    if path is None:
        presets = [file for folder in _PRESET_FOLDERS for kind in ("*.webp", "*.jpg") for file in folder.glob(kind)]
        if not presets:
            return procedural_scene(size)
        path = str(min(presets))
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--first-frame {path}: {reason_of(error)}", field="first_frame") from None


def procedural_scene(size: FrameSize) -> bytes:
    """A PNG of an evening sky over a chequered plain in perspective. The pattern makes camera motion visible."""
    v, u = np.mgrid[0 : size.height, 0 : size.width].astype(np.float64)
    horizon = size.height * 0.45
    sky = np.clip(v / horizon, 0, 1)[..., None]
    colour = np.array([86, 124, 178]) * (1 - sky) + np.array([244, 206, 160]) * sky
    depth = size.height / np.maximum(v - horizon, 1e-3)
    across = (u - size.width / 2) / size.height * depth
    chequer = (np.floor(across * 2) + np.floor(depth * 2)) % 2
    haze = np.clip(depth / 12, 0, 1)[..., None]
    plain = (
        np.where(chequer[..., None] > 0, [96, 122, 84], [70, 96, 66]) * (1 - haze) + np.array([244, 206, 160]) * haze
    )
    colour = np.where((v > horizon)[..., None], plain, colour)
    png = io.BytesIO()
    Image.fromarray(colour.astype(np.uint8)).save(png, "PNG")
    return png.getvalue()
