"""Inits of random fields and values: settings that a session runs with, or one line that names the field."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import msgspec
import numpy as np

from lingbot_rt.config import OUTPUT_FORMATS, ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session.messages import EXTENSIONS, Init, decode
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import MAX_PICTURE_SIDE, MIN_SIDE, SessionSettings, preview_size, resolve
from scripts.fuzz_targets.bounds import check_refusal, noted, within
from scripts.fuzz_targets.messages import KINDS, pack, payload, value
from tests.server.fake_engine import CARD

_FIELDS = {field.name: field for field in msgspec.structs.fields(Init)}
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 25, 30, 50, 51, 81, 82, 100, 101, 120, 121, 4096, 4097, 8192, 2**32 - 1, 2**32)
NUMBERS_TOO = (-1, 0.5, 1.5, -0.0, 1e-9, float("nan"), float("inf"), 2**53, 2**63 - 1, 2**64 - 1, 1e308)
SIZES = (
    "64x64",
    "832x480",
    "1280x720",
    "4096x4096",
    "48x64",
    "65x64",
    "16x16",
    "64X64",
    " 64*64 ",
    "0x0",
    "99999x16",
    "64",
)
PATHS = ("x.pth", "../x.pth", "/etc/passwd", "", "\0", "x" * 5000, "http://h/x", "a/../..", "~", "C:\\x")


def try_case(random: Random) -> str:
    config = ServeConfig(
        max_pixels=random.choice((64 * 64, 1280 * 720, 4096 * 4096)),
        default_output_format=random.choice(OUTPUT_FORMATS),
        postprocess_model_dir=random.choice((None, "/proc/self/fdinfo")),
    )
    message = init_map(random)
    with noted(message), within(96 * 2**20):
        try:
            init = decode(pack(random, message))
            assert isinstance(init, Init)
            settings = resolve(init, CARD, config)
        except (InvalidInit, InvalidEvent) as error:
            return check_refusal(error, needs_field=True)
        _check(settings, config)
    return "settings"


def init_map(random: Random) -> dict[Any, Any]:
    """Most fields are right, so that the others are reached."""
    message: dict[Any, Any] = {"type": "init", "prompt": "A street.", "first_frame": b"P5 1 1 255 0"}
    for name in random.sample(Init.__struct_fields__, k=random.randrange(12)):
        message[name] = _field(random, name) if random.random() < 0.9 else value(random, 2)
        for _ in range(3):
            # Most values are right, so that what depends on several of them is reached.
            if random.random() < 0.1 or _is_right(name, message[name]):
                break
            message[name] = _field(random, name)
    return message


def _is_right(name: str, given: Any) -> bool:
    try:
        msgspec.convert(given, _FIELDS[name].type)
    except msgspec.ValidationError:
        return False
    return True


def _field(random: Random, name: str) -> Any:
    match name:
        case "prompt" | "negative_prompt":
            return random.choice(("A street.", "x" * 8192, "x" * 8193, "", " ", "\0"))
        case "first_frame":
            return random.choice((b"", b"P5 1 1 255 0", "", "data:,", 7))
        case "model":
            return random.choice(("", CARD.model_id, "other", "é\n"))
        case "size":
            return random.choice(SIZES)
        case "realtime_output_format":
            return random.choice((*OUTPUT_FORMATS, "png", ""))
        case "upscaling_model_path" | "frame_interpolation_model_path":
            return random.choice(PATHS)
        case "condition_inputs":
            return {kind: payload(random, kind) for kind in random.choice((KINDS[1:2], KINDS[3:4], KINDS[1:4:2]))}
        case "protocol_extensions":
            return random.sample((*EXTENSIONS, "other"), k=random.randrange(5))
        case "pinned_events":
            return [_pinned(random) for _ in range(random.choice((0, 1, 3)))]
        case "enhance_prompt":
            return random.random() < 0.1
        case _ if _FIELDS[name].default is False:
            return random.choice((True, True, False, 1, 0.0))
        case _:
            return random.choice(NUMBERS if random.random() < 0.8 else NUMBERS_TOO)


def _pinned(random: Random) -> dict[str, Any]:
    kind = random.choice(KINDS[:4]) if random.random() < 0.9 else "pause"
    return {"chunk": random.choice((0, 1, 2.0, 2**32 - 1, -1)), "kind": kind, "payload": payload(random, kind)}


def _check(settings: SessionSettings, config: ServeConfig) -> None:
    """A session can be opened and planned with these settings, and its frames fit into their format."""
    size = settings.size
    assert min(size.width, size.height) >= MIN_SIDE
    assert size.pixels <= config.max_pixels
    assert size.is_whole_tokens
    for number in (settings.fps, settings.guidance_scale, settings.postprocess.interpolation_scale):
        assert math.isfinite(number), f"{number} is no number to compute with"
        assert number > 0
    assert settings.window_frames >= settings.sink_frames + settings.latent_frames
    made = settings.postprocess.size_out(size)
    output = settings.output
    limit = MAX_PICTURE_SIDE.get(output.name, 10**9)
    assert max(preview_size(made.width, made.height, output.preview_max_width)) <= limit
    session = Session("fuzz", settings)
    settings.session_plan(session.id, np.zeros((1, 1, 3), np.uint8))
    chunk = session.next_chunk(1.0)
    assert chunk.num_frames >= 1
    if chunk.plan.relative_poses is not None:
        assert chunk.plan.relative_poses.shape == (settings.latent_frames, 4, 4)
        assert np.isfinite(chunk.plan.relative_poses).all()
