"""``lingbot-rt client``: one walk through a served world, measured."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lingbot_rt.commands.clip import open_clip
from lingbot_rt.commands.walk import add_walk_options, chunks_for, first_picture, parse_keys, parse_size
from lingbot_rt.config import OUTPUT_FORMATS
from lingbot_rt.errors import ConfigError
from lingbot_rt.session.controls import Actions
from lingbot_rt.shapes import FrameSize, latent_frames_for, pixel_frames_of_chunk

_FALLBACK_SIZE = FrameSize(832, 480)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("LINGBOT_RT_API_KEY"), metavar="TEXT", help="when it has one"
    )
    add_walk_options(parser)
    parser.add_argument(
        "--format",
        choices=OUTPUT_FORMATS,
        metavar="|".join(OUTPUT_FORMATS),
        help="transport of the frames (default: the server's)",
    )
    parser.add_argument("--quality", type=int, metavar="N", help="of webp or jpeg, 1 to 100")
    parser.add_argument(
        "--live",
        action="store_true",
        help="send the keys on the way, as a player does, and measure key to frame; else they are one exact script",
    )
    parser.add_argument(
        "--init", action="append", default=[], metavar="FIELD=VALUE", help="any other field of the init, such as fps=25"
    )


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.client import connect

    actions = parse_keys(args.keys)
    latent_frames = latent_frames_for(args.num_frames)
    chunks = chunks_for(actions, latent_frames, args.chunks)
    further = parse_fields(args.init)
    size = parse_size(args.size) if args.size else served_size(args.url, args.api_key)
    init = {
        "prompt": args.prompt,
        "first_frame": first_picture(args.first_frame, size),
        "script": [[]] if args.live else actions,
        "size": str(size),
        "fps": args.fps,
        "num_frames": args.num_frames,
        "seed": args.seed,
        "num_inference_steps": args.steps,
        "max_chunks": chunks,
        "realtime_output_format": args.format,
        "output_compression": args.quality,
    } | further
    rate = 2 ** init.get("frame_interpolation_exp", 1) if init.get("enable_frame_interpolation") else 1
    fps = init["fps"] * rate
    total = rate * sum(pixel_frames_of_chunk(i, latent_frames) for i in range(chunks)) - (rate - 1)

    with (
        open_clip(args.out, fps) as clip,
        connect(args.url, api_key=args.api_key, **init) as world,
        tqdm(total=total, unit="frame", disable=None) as bar,
    ):
        measure = Measure()
        held: tuple[str, ...] = ()
        for frame in world:
            measure.frame(frame.chunk_index, frame.event_id)
            clip.add(frame.pixels)
            bar.update()
            if args.live:
                wanted = keys_at(actions, frame.index)
                if wanted != held:
                    held = wanted
                    measure.sent(world.hold(*held))
        if args.out:
            print(f"{args.out}: {measure.frames} frames at {fps:g} frames/s")
        print(measure.summary(world.stats))
    return 0


def keys_at(actions: Actions, frame_index: int) -> tuple[str, ...]:
    """The keys a player of this walk holds while pixel frame ``frame_index`` is shown."""
    latent = (frame_index + 3) // 4
    return actions[latent] if latent < len(actions) else ()


def parse_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """``fps=25`` -> {"fps": 25}; a value that is no JSON is a string. Raises ConfigError."""
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


def served_size(url: str, api_key: str | None) -> FrameSize:
    """The served model's own size; 832x480 where the server does not tell."""
    from lingbot_rt.client.served import served_model

    try:
        return FrameSize.parse(served_model(url, api_key)["default_size"])
    except (KeyError, ValueError):
        return _FALLBACK_SIZE


class Measure:
    """Times as they are seen at the client; make one when the init has left."""

    def __init__(self) -> None:
        self.frames = 0
        self._started = time.monotonic()
        self._first_at = self._last_at = self._started
        self._steady_from = self._started  # when the last frame of chunk 0 came
        self._steady_frames = 0
        self._waiting: dict[int, float] = {}  # event id -> when it was sent
        self._latencies_ms: list[float] = []

    def sent(self, event_id: int) -> None:
        self._waiting[event_id] = time.monotonic()

    def frame(self, chunk_index: int, event_id: int | None) -> None:
        now = self._last_at = time.monotonic()
        if self.frames == 0:
            self._first_at = now
        self.frames += 1
        if chunk_index == 0:
            self._steady_from = now
        else:
            self._steady_frames += 1
        if event_id is not None:
            for waiting in [known for known in self._waiting if known <= event_id]:
                self._latencies_ms.append(1000 * (now - self._waiting.pop(waiting)))

    def summary(self, stats: Sequence[Any]) -> str:
        """``stats``: the session's ChunkStats. The first chunk counts only where there is no other."""
        if not self.frames:
            return "no frames came"
        lines = [f"{self.frames} frames in {len(stats)} chunks"]
        lines.append(f"  init to first frame  {self._first_at - self._started:.2f} s")
        if self._steady_frames:
            rate = self._steady_frames / max(self._last_at - self._steady_from, 1e-9)
            lines.append(f"  steady rate          {rate:.1f} frames/s")
        steady = list(stats)[1:] or list(stats)
        if steady:
            lines.append(f"  chunk                {spread([chunk.chunk_total_ms for chunk in steady])}")
        told = [chunk for chunk in steady if chunk.overhead_ms is not None]
        if told:
            dit, vae, rest = (
                statistics.median(values)
                for values in (
                    [chunk.dit_ms for chunk in told],
                    [chunk.vae_ms for chunk in told],
                    [chunk.overhead_ms for chunk in told],
                )
            )
            lines.append(f"  of which (medians)   DiT {dit:.0f} ms, VAE {vae:.0f} ms, overhead {rest:.0f} ms")
        if self._latencies_ms:
            lines.append(f"  key to frame         {spread(self._latencies_ms)}, {len(self._latencies_ms)} key changes")
        return "\n".join(lines)


def spread(values_ms: Sequence[float]) -> str:
    ordered = sorted(values_ms)
    p95 = ordered[min(round(0.95 * (len(ordered) - 1)), len(ordered) - 1)]
    return f"p50 {statistics.median(ordered):.0f} ms, p95 {p95:.0f} ms"
