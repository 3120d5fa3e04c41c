"""What ``client`` and ``generate`` share: the keys of a walk, its first picture, its options."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from lingbot_rt.errors import ConfigError
from lingbot_rt.session.controls import TOKENS, Actions
from lingbot_rt.shapes import FrameSize

DEFAULT_PROMPT = "A quiet street in soft morning light, stable camera motion."
DEFAULT_KEYS = "w*12,l*6,w*6"

_PACKAGE = Path(__file__).resolve().parents[1]
_PRESET_FOLDERS = (_PACKAGE / "webui" / "presets", _PACKAGE.parent / "webui" / "presets")  # in a wheel, in a checkout
_STEP = re.compile(rf"([{''.join(TOKENS)}]+|-)(?:\*(\d{{1,6}}))?")


def add_walk_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="what the world is (default: a quiet street)")
    parser.add_argument("--first-frame", metavar="FILE", help="the picture it starts from (default: a small preset)")
    parser.add_argument("--size", metavar="WxH", help="of the frames (default: the model's)")
    parser.add_argument(
        "--keys",
        default=DEFAULT_KEYS,
        help="w a s d moves, i j k l looks, - rests; *N holds for N latent frames (default: %(default)s)",
    )
    parser.add_argument("--chunks", type=int, metavar="N", help="how many to make (default: as many as the keys need)")
    parser.add_argument("--num-frames", type=int, default=9, metavar="N", help="of the first chunk (default: 9)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoise steps a chunk (default: the model's)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of all noise (default: 42)")
    parser.add_argument("--fps", type=float, default=16, metavar="N", help="frames/s of playback (default: 16)")
    parser.add_argument("--out", metavar="PATH", help="keep the frames: clip.mp4, or a folder for PNGs")


def parse_keys(text: str) -> Actions:
    """``"w*6,l*3,wa*4"`` -> 13 latent frames: 6 of (w), 3 of (l), 4 of (w, a). Raises ConfigError."""
    actions: list[tuple[str, ...]] = []
    for step in text.split(","):
        match = _STEP.fullmatch(step.strip())
        if match is None:
            raise ConfigError(
                f'--keys {step!r}: expected keys of {" ".join(TOKENS)} and a count, such as "w*6,l*3,wa*4,-*2"',
                field="keys",
            )
        keys = () if match[1] == "-" else tuple(dict.fromkeys(match[1]))
        actions += [keys] * int(match[2] or 1)
    return tuple(actions)


def parse_size(text: str) -> FrameSize:
    """``"832x480"`` -> FrameSize. Raises ConfigError."""
    try:
        return FrameSize.parse(text)
    except ValueError as error:
        raise ConfigError(f"--size {error}", field="size") from None


def chunks_for(actions: Actions, latent_frames: int, asked: int | None) -> int:
    """Chunks that play all keys, or as many as were asked for."""
    return asked if asked is not None else max(-(-len(actions) // latent_frames), 1)


def first_picture(path: str | None, size: FrameSize) -> bytes:
    """The file's bytes; without one, the first preset of the web page; without any, a drawn scene of ``size``."""
    if path is None:
        presets = [file for folder in _PRESET_FOLDERS for kind in ("*.webp", "*.jpg") for file in folder.glob(kind)]
        if not presets:
            return drawn_scene(size)
        path = str(min(presets))
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--first-frame {path}: {error.strerror}", field="first_frame") from None


def drawn_scene(size: FrameSize) -> bytes:
    """A PNG: evening sky over a chequered plain, in perspective, so that motion can be seen."""
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
