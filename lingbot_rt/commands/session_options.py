"""Options of a scripted session, shared by ``client`` and ``generate``: its keys, its first frame, its length."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lingbot_rt.client.camera_poses import poses_payload, read_poses
from lingbot_rt.client.protocol import nearest_hint
from lingbot_rt.client.start_picture import start_picture
from lingbot_rt.commands.options import (
    add_frames_option,
    add_size_option,
    argument,
    parse_init_fields,
    path_text,
    positive_int,
    real_number,
    require_existing,
    whole_number,
)
from lingbot_rt.commands.output import complain
from lingbot_rt.errors import ConfigError, EventRefused, RequestError, quoted, reason_of
from lingbot_rt.session.controls import MAX_PENDING, TOKENS, Actions
from lingbot_rt.session.messages import (
    FPS_RANGE,
    MAX_NUM_FRAMES,
    MAX_PROMPT_CHARACTERS,
    STEPS_RANGE,
    WIRE_SIZE,
    Init,
    decode,
)
from lingbot_rt.session.shown import shown
from lingbot_rt.shapes import FrameSize

DEFAULT_PROMPT = "A quiet village on a sunny day, stable camera motion."
DEFAULT_KEYS = "w*12,l*6,w*6"
DEFAULTS = {"num_frames": 9, "seed": 42, "fps": 16.0}
"""Of options of a session, beside those that are not set."""

_KEYS_STEP = re.compile(rf"([{''.join(TOKENS)}]+|-)(?:\*([1-9]\d{{0,5}}))?")


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
        metavar="KEYS",
        help="comma-separated keys: w a s d move, i j k l look, - is no key; *N holds them for N latent frames "
        f"(default: {DEFAULT_KEYS})",
    )
    add_poses_options(parser)
    parser.add_argument(
        "--chunks",
        type=positive_int,
        metavar="N",
        help="chunks to generate (default: as many as --keys or --poses fills)",
    )
    parser.add_argument(
        "--num-frames",
        type=whole_number(1, MAX_NUM_FRAMES),
        default=DEFAULTS["num_frames"],
        metavar="N",
        help=f"pixel frames of the first chunk, 1 to {MAX_NUM_FRAMES} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=whole_number(*STEPS_RANGE), metavar="N", help="denoise steps per chunk (default: the model's)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=DEFAULTS["seed"],
        metavar="N",
        help="seed of the noise (default: 42)",
    )
    parser.add_argument(
        "--fps",
        type=real_number(*FPS_RANGE),
        default=DEFAULTS["fps"],
        metavar="N",
        help="playback rate in frames/s (default: 16)",
    )
    add_frames_option(parser, "--out", "where the frames are saved", default_out)


def add_poses_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--poses",
        type=path_text,
        metavar="FILE",
        help="camera path instead of --keys: a NumPy file [n, 4, 4] of camera-to-world matrices, OpenCV axes, one per "
        "pixel frame; or a folder with poses.npy and perhaps intrinsics.npy (default: none)",
    )
    parser.add_argument(
        "--intrinsics",
        type=path_text,
        metavar="FILE",
        help="NumPy file [4] or [n, 4] of fx, fy, cx, cy in pixels for --poses (default: the model's own)",
    )
    parser.add_argument(
        "--intrinsics-size",
        type=argument(FrameSize.parse),
        metavar="WxH",
        help=f"size of the pictures that the intrinsics are for (default: {WIRE_SIZE})",
    )


def add_first_frame_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--first-frame",
        type=path_text,
        metavar="FILE",
        help="picture that the session starts from (default: a village, which the package brings)",
    )


@argument
def prompt_text(text: str) -> str:
    """For argparse: a prompt that a session takes."""
    if not text.strip() or len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{quoted(text)}: expected a sentence of 1 to {MAX_PROMPT_CHARACTERS} characters")
    if text.encode(errors="replace").decode() != text:  # half of a surrogate pair, from bytes that are not UTF-8
        raise ValueError(f"{quoted(text)}: expected text in UTF-8")
    return text


def init_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """The fields that --init sets. Raises ConfigError for what is no field of an init."""
    extra = parse_init_fields(assignments)
    for name in extra:
        if name not in Init.__struct_fields__:
            raise ConfigError(f"--init {quoted(name)}: an init has no such field{nearest_hint(name)}", field="init")
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
        match = _KEYS_STEP.fullmatch(step.strip().lower())
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


def chunks_for(moves: Sequence[Any], latent_frames: int, requested: int | None) -> int:
    """``requested``, or as many chunks of ``latent_frames`` as play all ``moves``, one per latent frame."""
    return requested if requested is not None else max(-(-len(moves) // latent_frames), 1)


def require_poses_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of a path without one, for two kinds of control, and for missing files."""
    for option in ("intrinsics", "intrinsics_size"):
        if args.poses is None and getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')}: expected --poses with it", field=option)
    if args.poses is not None and args.keys is not None:
        raise ConfigError("--poses: expected either --poses or --keys, not both", field="poses")
    require_existing("--poses", args.poses)
    require_existing("--intrinsics", args.intrinsics)


def script_of(args: argparse.Namespace) -> tuple[dict[str, Any], Sequence[Any]]:
    """The condition_inputs of an init for --poses or --keys, and its entries, one per latent frame.

    Raises ConfigError for keys or poses that a session refuses.
    """
    if args.poses is None:
        actions = parse_script(args.keys or DEFAULT_KEYS)
        return {"camera_actions": actions}, actions
    try:
        poses, intrinsics = read_poses(args.poses, args.intrinsics)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            size = str(args.intrinsics_size or WIRE_SIZE)
            payload = poses_payload(poses, intrinsics, size=size, anchor="session")
    except EventRefused as error:
        raise ConfigError(f"--poses {quoted(args.poses)}: {error}", field="poses") from None
    for warning in caught:
        complain(f"--poses: {warning.message}")
    return {"camera_poses": payload}, payload["poses"]


def first_frame_bytes(path: str | None) -> bytes:
    """The encoded first frame: the file's bytes, or the picture that the package brings. Raises ConfigError."""
    if path is None:
        return start_picture()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--first-frame {path}: {reason_of(error)}", field="first_frame") from None
