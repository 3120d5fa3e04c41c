"""``lingbot-rt client``: runs one session on a server, measures it and saves its frames."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lingbot_rt.commands.frame_writer import open_writer
from lingbot_rt.commands.options import (
    add_client_options,
    api_key_from,
    require_existing,
    require_session_size,
    whole_number,
)
from lingbot_rt.commands.output import say
from lingbot_rt.commands.session_options import (
    add_session_options,
    checked_init,
    chunks_for,
    first_frame_bytes,
    init_fields,
    parse_keys,
    parse_script,
)
from lingbot_rt.session.controls import Actions
from lingbot_rt.session.messages import Init
from lingbot_rt.shapes import FrameSize, latent_frame_of_pixel_frame, latent_frames_for, num_frames_for

_FALLBACK_SIZE = FrameSize(832, 480)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_options(parser)
    add_session_options(parser)
    parser.add_argument("--quality", type=whole_number(1, 100), metavar="N", help="webp or jpeg quality, 1 to 100")
    parser.add_argument(
        "--live",
        action="store_true",
        help="press --keys during the session, as a person would, and measure key-to-frame latency "
        "(default: send them as one script in the init)",
    )


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.client import connect

    require_session_size(args.size)
    require_existing("--first-frame", args.first_frame)
    actions = parse_keys(args.keys) if args.live else parse_script(args.keys)
    api_key = api_key_from(args)
    options = {
        "prompt": args.prompt,
        "fps": args.fps,
        "num_frames": args.num_frames,
        "seed": args.seed,
        "num_inference_steps": args.steps,
        "max_chunks": chunks_for(actions, latent_frames_for(args.num_frames), args.chunks),
        "realtime_output_format": args.format,
        "output_compression": args.quality,
        "condition_inputs": {"camera_actions": [[]] if args.live else actions},
    }
    extra = init_fields(args.init)
    # Checked once before anything is sent. The picture may be drawn in the size that the server reports.
    checked_init(options | {"first_frame": b""}, extra)
    size = args.size or served_size(args.url, api_key)
    options |= {"first_frame": first_frame_bytes(args.first_frame, size), "size": str(size)}
    fields, init = checked_init(options, extra)
    rate = 2**init.frame_interpolation_exp if init.enable_frame_interpolation else 1
    fps = init.fps * rate

    with (
        open_writer(args.out, fps) as write,
        connect(args.url, api_key=api_key, script=None, **fields) as session,
        tqdm(total=_expected_frames(init, rate), unit="frame", disable=None) as bar,
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
    if args.out and metrics.frames:
        say(f"{args.out}: {metrics.frames} frames at {fps:g} frames/s")
    say(metrics.summary(session.stats))
    return 0


def _expected_frames(init: Init, rate: int) -> int | None:
    """Pixel frames of the whole session; None for one without end. ``rate``: frames per generated frame."""
    if init.max_chunks is None:
        return None
    return rate * num_frames_for(init.max_chunks * latent_frames_for(init.num_frames)) - (rate - 1)


def keys_at(actions: Actions, frame_index: int) -> tuple[str, ...]:
    """The keys held while pixel frame ``frame_index`` is shown: none after the end of ``actions``."""
    latent = latent_frame_of_pixel_frame(frame_index)
    return actions[latent] if latent < len(actions) else ()


def served_size(url: str, api_key: str | None) -> FrameSize:
    """The served model's default size, or 832x480 if the server does not report one."""
    from lingbot_rt.client.server_info import fetch_model_info

    try:
        return FrameSize.parse(fetch_model_info(url, api_key)["default_size"])
    except (KeyError, TypeError, ValueError):
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
            lines.append(f"  of which (medians)   {_parts(timed)}")
        if self._latencies_ms:
            lines.append(f"  key to frame         {p50_p95(self._latencies_ms)}, {len(self._latencies_ms)} key changes")
        return "\n".join(lines)


def _parts(chunks: Sequence[Any]) -> str:
    """The medians of DiT and VAE, and what is left of the median chunk. Says so when the parts do not add up."""
    total, dit, vae = (
        round(statistics.median([getattr(chunk, name) for chunk in chunks]))
        for name in ("chunk_total_ms", "dit_ms", "vae_ms")
    )
    overlaps = any(chunk.overlaps for chunk in chunks) or dit + vae > total
    parts = f"DiT {dit} ms, VAE {vae} ms, overhead {max(total - dit - vae, 0)} ms"
    return f"{parts}; they overlap with each other or with other chunks" if overlaps else parts


def p50_p95(values_ms: Sequence[float]) -> str:
    """Median and nearest-rank 95th percentile."""
    ordered = sorted(values_ms)
    p95 = ordered[min(round(0.95 * (len(ordered) - 1)), len(ordered) - 1)]
    return f"p50 {statistics.median(ordered):.0f} ms, p95 {p95:.0f} ms"
