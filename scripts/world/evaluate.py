"""Measures a trained world through the serving code, compares it with the bars, and makes a contact sheet.

    python -m scripts.world.evaluate --model runs/world/model --out runs/world/evaluation
    python -m scripts.world.evaluate --model runs/world/model --short            # about a minute on two cores

Writes figures.json, evaluation.md and sheet.jpg (true rows above generated rows, columns in time) into --out. The exit
code is 1 if a bar is missed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lingbot_rt.bench.serve import SessionSpec, run_session, serve_report
from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.shapes import FrameSize
from scripts.world.metrics import contact_sheet, long_rollout, obedience, prompt_switch, rollouts, vae_psnr
from scripts.world.render import Renderer
from scripts.world.worlds import ABLATIONS, ServedWorld

START_LIMIT_S = 180
SPEED_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class EvaluationSize:
    """How many cases are measured. ``slack`` lowers every bar but the speed's, because few cases scatter more."""

    clips: int
    states: int
    late_states: int
    switches: int
    trajectories: int
    chunks: tuple[int, ...]
    long_rollouts: int
    slack: float


FULL = EvaluationSize(32, 48, 16, 40, 12, (1, 3, 6, 12, 24), 4, 0.0)
SHORT = EvaluationSize(4, 2, 1, 4, 2, (1, 3, 6), 0, 0.15)


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


def measure(world: ServedWorld, size: EvaluationSize, out: Path) -> tuple[list[Bar], dict[str, Any]]:
    """Everything but the speed: the bars, and the content of figures.json."""
    renderer, ease = world.renderer, 1 - size.slack
    figures: dict[str, Any] = {"vae_psnr": vae_psnr(world.pipeline.vae, renderer, size.clips)}
    rollout = rollouts(world, renderer, size.trajectories, size.chunks, neutral=size is FULL)
    figures["rollout_psnr"] = rollout.scores
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(rollout.sheet)).save(out / "sheet.jpg", quality=92)
    early = obedience(world, renderer, size.states, after=1)
    late = obedience(world, renderer, size.late_states, after=8)
    figures["obedience_1"], figures["obedience_8"] = (
        early.by_key | {"all": early.share},
        late.by_key | {"all": late.share},
    )
    figures["prompt_switch"] = prompt_switch(world, renderer, size.switches)
    got = rollout.scores["generated"]
    bars = [
        Bar("VAE PSNR, dB", figures["vae_psnr"], 31 * ease, 34),
        Bar("roll-out PSNR, chunk 1, dB", got[1], 24 * ease, 27),
        Bar("roll-out PSNR, chunk 6, dB", got[6], 19 * ease, 22),
        Bar("obedience after 1 chunk", early.share, 0.95 * ease, 0.98),
        Bar("obedience after 8 chunks, pose fitted", late.share, 0.85 * ease, 0.95),
        Bar("prompt switch within 2 chunks", figures["prompt_switch"], 0.95 * ease, 0.99),
    ]
    if size is FULL:
        bars.append(Bar("least obeyed key", min(early.by_key.values()), 0.88, 0.88))
    if size.long_rollouts:
        figures["after_60_chunks"] = ratios = long_rollout(world, renderer, size.long_rollouts)
        bars += [
            Bar(f"after 60 chunks, {name} over the truth's", ratios[name], 0.25, 0.1, True)
            for name in ("std", "gradient")
        ]
    return bars, figures


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
    chunks = list(next(iter(figures["rollout_psnr"].values())))
    lines += ["", "| PSNR at chunk | " + " | ".join(map(str, chunks)) + " |", "|---" * (len(chunks) + 1) + "|"]
    for source, scores in figures["rollout_psnr"].items():
        lines.append(f"| {source} | " + " | ".join(f"{scores[chunk]:.1f}" for chunk in chunks) + " |")
    keys = list(figures["obedience_1"])
    lines += ["", "| obedience | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, of in (("after 1 chunk", "obedience_1"), ("after 8", "obedience_8")):
        lines.append(f"| {name} | " + " | ".join(f"{figures[of][key]:.0%}" for key in keys) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/world/model"), help="a whole checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("runs/world/evaluation"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--short", action="store_true", help="about a minute on two cores: fewer cases, lower bars, no speed"
    )
    parser.add_argument("--break", dest="ablation", choices=ABLATIONS, help="disable a part: a bar must then be missed")
    args = parser.parse_args()
    began = time.monotonic()
    size = open_checkpoint(str(args.model)).default_size
    world = ServedWorld(args.model, args.device, Renderer(size, args.device), args.ablation)
    bars, figures = measure(world, SHORT if args.short else FULL, args.out)
    if not args.short:
        figures["speed"] = speed(args.model, size)
        bars.append(Bar("frames/s through the socket, CPU, 2 threads", figures["speed"]["frames_per_s"] or 0.0, 16, 24))
    figures["seconds"] = round(time.monotonic() - began, 1)
    text = as_markdown(bars, figures)
    (args.out / "evaluation.md").write_text(text, encoding="utf-8")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(text)
    return 0 if all(bar.reached for bar in bars) else 1


if __name__ == "__main__":
    raise SystemExit(main())
