"""Measures a trained world through the serving code, compares it with the bars, and makes a contact sheet.

    python -m scripts.world.evaluate --model runs/world/model --out runs/world/evaluation
    python -m scripts.world.evaluate --model runs/world/model --short            # about 90 s on two cores

    python -m scripts.world.evaluate --model runs/world/model --only vae,rollouts
    python -m scripts.world.evaluate --model runs/world/model --video walk.mp4

Writes into --out: figures.json, evaluation.md, and the contact sheets sheet.jpg (roll-outs) and turn.jpg (a full turn),
with true rows above generated rows and columns in time. The exit code is 1 if a bar of what was measured is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lingbot_rt.bench.serve import SessionSpec, run_session, serve_report
from lingbot_rt.commands.frame_writer import open_writer
from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.shapes import FrameSize
from scripts.world.metrics import (
    contact_sheet,
    full_turn,
    long_rollout,
    obedience,
    prompt_switch,
    rollouts,
    standing_still,
    vae_psnr,
    walk_beside_truth,
)
from scripts.world.render import Renderer
from scripts.world.worlds import ABLATIONS, Frames, ServedWorld, World

START_LIMIT_S = 180
SPEED_CHUNKS = 16
VIDEO_CHUNKS = 80  # a minute of 12 frames per chunk at VIDEO_FPS
VIDEO_FPS = 16


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure with its bar and its aim: lower limits, or for a ratio the largest distance from 1."""

    name: str
    value: float
    bar: float
    aim: float
    ratio: bool = False

    @property
    def reached(self) -> bool:
        return abs(self.value - 1) <= self.bar if self.ratio else self.value >= self.bar

    @property
    def aimed(self) -> bool:
        return abs(self.value - 1) <= self.aim if self.ratio else self.value >= self.aim


@dataclass(frozen=True, slots=True)
class EvaluationSize:
    """How many cases each group measures, and the groups measured by default.

    ``slack`` moves every limit but the speed's by that share, because few cases scatter more.
    """

    cases: Mapping[str, int]
    default: tuple[str, ...]
    rollout_chunks: tuple[int, ...]
    slack: float

    def bar(self, name: str, value: float, bar: float, aim: float, ratio: bool = False) -> Bar:
        return Bar(name, value, bar * (1 + self.slack if ratio else 1 - self.slack), aim, ratio)


Measured = tuple[list[Bar], dict[str, Any]]
"""The bars of a group, and its part of figures.json."""


def _vae(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    score = vae_psnr(world.pipeline.vae, world.renderer, size.cases["vae"])
    return [size.bar("VAE PSNR, dB", score, 32, 35)], {"vae_psnr": score}


def _rollouts(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    found = rollouts(world, world.renderer, size.cases["rollouts"], size.rollout_chunks, neutral=not size.slack)
    _save_sheet(found.sheet, out / "sheet.jpg")
    got = found.scores["generated"]
    bars = [
        size.bar(f"roll-out PSNR, chunk {chunk}, dB", got[chunk], bar, aim)
        for chunk, bar, aim in ((1, 24, 27), (6, 19, 22), (24, 17, 19))
        if chunk in got
    ]
    return bars, {"rollout_psnr": found.scores}


def _obedience(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    found = obedience(world, world.renderer, size.cases["obedience"], after=1)
    bars = [size.bar("obedience after 1 chunk", found.share, 0.95, 0.98)]
    if not size.slack:  # a few cases of one key say nothing
        bars.append(size.bar("least obeyed key", min(found.by_key.values()), 0.88, 0.88))
    return bars, {"obedience_1": found.by_key | {"all": found.share}}


def _late_obedience(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    found = obedience(world, world.renderer, size.cases["late-obedience"], after=8)
    bar = size.bar("obedience after 8 chunks, pose fitted", found.share, 0.85, 0.95)
    return [bar], {"obedience_8": found.by_key | {"all": found.share}}


def _prompts(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    share = prompt_switch(world, world.renderer, size.cases["prompts"])
    return [size.bar("prompt switch within 2 chunks", share, 0.95, 0.99)], {"prompt_switch": share}


def _long(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    ratios = long_rollout(world, world.renderer, size.cases["long"])
    bars = [
        size.bar(f"after 60 chunks, {name} over the truth's", ratios[of], 0.25, 0.1, ratio=True)
        for of, name in (("std", "standard deviation"), ("gradient", "gradient energy"))
    ]
    return bars, {"after_60_chunks": ratios}


def _turn(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    found = full_turn(world, world.renderer, size.cases["turn"])
    _save_sheet(found.sheet, out / "turn.jpg")
    figures = {name: getattr(found, name) for name in ("psnr", "random_view", "above", "turned")}
    bar = size.bar("full turn, PSNR to the first view above a random view, dB", found.above, 3, 6)
    return [bar], {"full_turn": figures}


def _still(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    scores = standing_still(world, world.renderer, size.cases["still"])
    bars = [size.bar(f"standing still 60 chunks, {name}, PSNR, dB", score, 20, 24) for name, score in scores.items()]
    return bars, {"standing_still": scores}


def _speed(world: ServedWorld, size: EvaluationSize, out: Path) -> Measured:
    found = speed(world.folder, world.renderer.size)
    bar = Bar("frames/s through the socket, CPU, 2 threads", found["frames_per_s"] or 0.0, 16, 24)
    return [bar], {"speed": found}


GROUPS: dict[str, Callable[[ServedWorld, EvaluationSize, Path], Measured]] = {
    "vae": _vae,
    "rollouts": _rollouts,
    "obedience": _obedience,
    "late-obedience": _late_obedience,
    "prompts": _prompts,
    "long": _long,
    "turn": _turn,
    "still": _still,
    "speed": _speed,
}

FULL = EvaluationSize(
    cases={
        "vae": 32,
        "rollouts": 12,
        "obedience": 48,
        "late-obedience": 16,
        "prompts": 40,
        "long": 4,
        "turn": 8,
        "still": 4,
    },
    default=tuple(GROUPS),
    rollout_chunks=(1, 3, 6, 12, 24),
    slack=0.0,
)
SHORT = EvaluationSize(
    cases={
        "vae": 4,
        "rollouts": 2,
        "obedience": 2,
        "late-obedience": 1,
        "prompts": 4,
        "long": 1,
        "turn": 1,
        "still": 1,
    },
    default=("vae", "rollouts", "obedience", "late-obedience", "prompts"),
    rollout_chunks=(1, 3, 6),
    slack=0.15,
)


def measure(
    world: ServedWorld, size: EvaluationSize, groups: Sequence[str], out: Path
) -> tuple[list[Bar], dict[str, Any]]:
    """The bars of ``groups``, and the content of figures.json. Writes the contact sheets into ``out``."""
    bars: list[Bar] = []
    figures: dict[str, Any] = {}
    for name in groups:
        began = time.monotonic()
        more_bars, more_figures = GROUPS[name](world, size, out)
        bars += more_bars
        figures |= more_figures
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return bars, figures


def _save_sheet(sheet: list[list[tuple[Frames, Frames]]], path: Path) -> None:
    Image.fromarray(contact_sheet(sheet)).save(path, quality=92)


def record_walk(world: World, renderer: Renderer, path: Path, chunks: int = VIDEO_CHUNKS) -> None:
    """A walk as an MP4, or a folder of PNGs under any other name: truth left, generated right, at twice the size."""
    with open_writer(str(path), VIDEO_FPS) as write:
        for frame in walk_beside_truth(world, renderer, chunks):
            write(frame)


def speed(folder: Path, size: FrameSize, threads: int = 2) -> dict[str, float | None]:
    """Frames per second and latency as a client receives them, float32 on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model-path", str(folder), "--device", "cpu", "--dtype", "float32", "--cpu-threads", str(threads)]
    server = subprocess.Popen(
        [sys.executable, "-m", "lingbot_rt", "serve", "--port", str(port), *flags], stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, server)
        init = {
            "prompt": "A sunny day.",
            "first_frame": _grey_picture(size),
            "size": str(size),
            "max_chunks": SPEED_CHUNKS,
        }
        plan = SessionSpec(url, None, init, press_every_s=0.8, playback_fps=16, playback_lead_s=1)
        report = serve_report(plan, {}, run_session(plan, lambda: None))
    finally:
        server.terminate()
        server.wait(timeout=20)
    latency = report.event_to_frame_ms
    return {
        "frames_per_s": report.frames_per_s,
        "first_frame_s": report.first_frame_s,
        "key_to_frame_ms": None if latency is None else latency.p50,
    }


def _wait_until_ready(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"lingbot-rt serve ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"lingbot-rt serve was not ready within {START_LIMIT_S} s")


def _grey_picture(size: FrameSize) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size.width, size.height), (127, 127, 127)).save(buffer, "PNG")
    return buffer.getvalue()


def as_markdown(bars: list[Bar], figures: dict[str, Any]) -> str:
    lines = ["| | measured | bar | aim | |", "|---|---|---|---|---|"]
    for bar in bars:
        reached = "aim" if bar.aimed else "bar" if bar.reached else "missed"
        within = "within " if bar.ratio else ""
        lines.append(f"| {bar.name} | {bar.value:.3g} | {within}{bar.bar:.3g} | {within}{bar.aim:.3g} | {reached} |")
    if "rollout_psnr" in figures:
        chunks = list(next(iter(figures["rollout_psnr"].values())))
        lines += ["", "| PSNR at chunk | " + " | ".join(map(str, chunks)) + " |", "|---" * (len(chunks) + 1) + "|"]
        for source, scores in figures["rollout_psnr"].items():
            lines.append(f"| {source} | " + " | ".join(f"{scores[chunk]:.1f}" for chunk in chunks) + " |")
    obeyed = {
        name: figures[of]
        for name, of in (("after 1 chunk", "obedience_1"), ("after 8", "obedience_8"))
        if of in figures
    }
    if obeyed:
        keys = list(next(iter(obeyed.values())))
        lines += ["", "| obedience | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
        for name, by_key in obeyed.items():
            lines.append(f"| {name} | " + " | ".join(f"{by_key[key]:.0%}" for key in keys) + " |")
    return "\n".join(lines) + "\n"


def _group_names(text: str) -> list[str]:
    """The groups named in ``text``, in the order of GROUPS."""
    names = {name.strip() for name in text.split(",")}
    if unknown := names - set(GROUPS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/world/model"), help="a whole checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("runs/world/evaluation"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--short", action="store_true", help="about 90 s on two cores: fewer groups and cases, lower bars"
    )
    parser.add_argument("--only", type=_group_names, metavar="NAME,NAME", help=f"measure these: {', '.join(GROUPS)}")
    parser.add_argument(
        "--video", type=Path, metavar="FILE.mp4", help="first record a minute's walk: truth left, generated right"
    )
    parser.add_argument("--break", dest="ablation", choices=ABLATIONS, help="disable a part: a bar must then be missed")
    args = parser.parse_args()
    size = SHORT if args.short else FULL
    frame_size = open_checkpoint(str(args.model)).default_size
    world = ServedWorld(args.model, args.device, Renderer(frame_size, args.device), args.ablation)
    if args.video is not None:
        try:
            record_walk(world, world.renderer, args.video)
        except ConfigError as error:
            parser.error(str(error))
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    bars, figures = measure(world, size, args.only or size.default, args.out)
    figures["seconds"] = round(time.monotonic() - began, 1)
    text = as_markdown(bars, figures)
    (args.out / "evaluation.md").write_text(text, encoding="utf-8")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(text)
    return 0 if all(bar.reached for bar in bars) else 1


if __name__ == "__main__":
    raise SystemExit(main())
