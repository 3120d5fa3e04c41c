"""``lingbot-rt client``: runs one session on a server, measures it and saves its frames."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lingbot_rt.commands.frame_writer import open_writer
from lingbot_rt.commands.options import add_client_options, parse_init_fields
from lingbot_rt.commands.session_options import (
    add_session_options,
    chunks_for,
    first_frame_bytes,
    parse_keys,
    parse_script,
)
from lingbot_rt.session.controls import Actions
from lingbot_rt.shapes import FrameSize, latent_frame_of_pixel_frame, latent_frames_for, pixel_frames_of_chunk

_FALLBACK_SIZE = FrameSize(832, 480)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_options(parser)
    add_session_options(parser)
    parser.add_argument("--quality", type=int, metavar="N", help="webp or jpeg quality, 1 to 100")
    parser.add_argument(
        "--live",
        action="store_true",
        help="press --keys during the session, as a person would, and measure key-to-frame latency "
        "(default: send them as one script in the init)",
    )


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.client import connect

    actions = parse_keys(args.keys) if args.live else parse_script(args.keys)
    latent_frames = latent_frames_for(args.num_frames)
    chunks = chunks_for(actions, latent_frames, args.chunks)
    other_fields = parse_init_fields(args.init)
    size = args.size or served_size(args.url, args.api_key)
    init = {
        "prompt": args.prompt,
        "first_frame": first_frame_bytes(args.first_frame, size),
        "script": [[]] if args.live else actions,
        "size": str(size),
        "fps": args.fps,
        "num_frames": args.num_frames,
        "seed": args.seed,
        "num_inference_steps": args.steps,
        "max_chunks": chunks,
        "realtime_output_format": args.format,
        "output_compression": args.quality,
    } | other_fields
    rate = 2 ** init.get("frame_interpolation_exp", 1) if init.get("enable_frame_interpolation") else 1
    fps = init["fps"] * rate
    total = rate * sum(pixel_frames_of_chunk(i, latent_frames) for i in range(chunks)) - (rate - 1)

    with (
        open_writer(args.out, fps) as write,
        connect(args.url, api_key=args.api_key, **init) as session,
        tqdm(total=total, unit="frame", disable=None) as bar,
    ):
        metrics = ClientMetrics()
        held: tuple[str, ...] = ()
        for frame in session:
            metrics.frame_received(frame.chunk_index, frame.event_id)
            write(frame.pixels)
            bar.update()
            if args.live:
                wanted = keys_at(actions, frame.index)
                if wanted != held:
                    held = wanted
                    metrics.event_sent(session.hold(*held))
        if args.out:
            print(f"{args.out}: {metrics.frames} frames at {fps:g} frames/s")
        print(metrics.summary(session.stats))
    return 0


def keys_at(actions: Actions, frame_index: int) -> tuple[str, ...]:
    """The keys held while pixel frame ``frame_index`` is shown: none after the end of ``actions``."""
    latent = latent_frame_of_pixel_frame(frame_index)
    return actions[latent] if latent < len(actions) else ()


def served_size(url: str, api_key: str | None) -> FrameSize:
    """The served model's default size, or 832x480 if the server does not report one."""
    from lingbot_rt.client.server_info import fetch_model_info

    try:
        return FrameSize.parse(fetch_model_info(url, api_key)["default_size"])
    except (KeyError, ValueError):
        return _FALLBACK_SIZE


class ClientMetrics:
    """Counts frames and measures times at the client. Time starts at construction: make one after sending the init."""

    def __init__(self) -> None:
        self.frames = 0
        self._started = time.monotonic()
        self._first_at = self._last_at = self._started
        self._steady_from = self._started  # arrival of chunk 0's last frame
        self._steady_frames = 0
        self._unanswered: dict[int, float] = {}  # event id -> when it was sent
        self._latencies_ms: list[float] = []

    def event_sent(self, event_id: int) -> None:
        self._unanswered[event_id] = time.monotonic()

    def frame_received(self, chunk_index: int, event_id: int | None) -> None:
        now = self._last_at = time.monotonic()
        if self.frames == 0:
            self._first_at = now
        self.frames += 1
        if chunk_index == 0:
            self._steady_from = now
        else:
            self._steady_frames += 1
        if event_id is not None:
            for answered in [known for known in self._unanswered if known <= event_id]:
                self._latencies_ms.append(1000 * (now - self._unanswered.pop(answered)))

    def summary(self, stats: Sequence[Any]) -> str:
        """The text to print. ``stats``: the session's ChunkStats; the first chunk is left out if there are others."""
        if not self.frames:
            return "no frames received"
        lines = [f"{self.frames} frames in {len(stats)} chunks"]
        lines.append(f"  init to first frame  {self._first_at - self._started:.2f} s")
        if self._steady_frames:
            rate = self._steady_frames / max(self._last_at - self._steady_from, 1e-9)
            lines.append(f"  steady rate          {rate:.1f} frames/s")
        steady = list(stats)[1:] or list(stats)
        if steady:
            lines.append(f"  chunk                {p50_p95([chunk.chunk_total_ms for chunk in steady])}")
        timed = [chunk for chunk in steady if chunk.overhead_ms is not None]
        if timed:
            dit, vae, rest = (
                statistics.median(values)
                for values in (
                    [chunk.dit_ms for chunk in timed],
                    [chunk.vae_ms for chunk in timed],
                    [chunk.overhead_ms for chunk in timed],
                )
            )
            lines.append(f"  of which (medians)   DiT {dit:.0f} ms, VAE {vae:.0f} ms, overhead {rest:.0f} ms")
        if self._latencies_ms:
            lines.append(f"  key to frame         {p50_p95(self._latencies_ms)}, {len(self._latencies_ms)} key changes")
        return "\n".join(lines)


def p50_p95(values_ms: Sequence[float]) -> str:
    """Median and nearest-rank 95th percentile."""
    ordered = sorted(values_ms)
    p95 = ordered[min(round(0.95 * (len(ordered) - 1)), len(ordered) - 1)]
    return f"p50 {statistics.median(ordered):.0f} ms, p95 {p95:.0f} ms"
