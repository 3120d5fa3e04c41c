"""What it costs to keep a session: per chunk, in memory and on disk, and until it goes on again.

One session runs as many chunks as its window holds, and some more, without a history, with one of latents, and with one
that holds keys, values and features. Each of the latter then becomes a file, goes back by some chunks, leaves the
device twice and returns, and is opened from the file. The first time, host memory is made for it.

    python scripts/bench_kept.py builtin
    python scripts/bench_kept.py lingbot-world-fast --load-format dummy --size 832x480 --window 18
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import torch

from lingbot_rt.bench.figures import table
from lingbot_rt.client.start_picture import start_picture
from lingbot_rt.commands.options import frame_size
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.going_back import set_back
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import default_plan
from lingbot_rt.engine.world import go_on_from, read_snapshot, to_bytes, world_parts
from lingbot_rt.server.first_frame import decode_picture
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, SessionPlan

MB = 1e6
HOST = torch.device("cpu")


class Clock:
    """Seconds of named steps, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._wait()
        begun = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = time.perf_counter() - begun

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def chunks_ms(pipeline: Pipeline, session: SessionState, chunks: int) -> list[float]:
    """Milliseconds of each chunk of a walk, with what is done to keep it."""
    camera, spent = CameraPath(), []
    for index in range(chunks):
        poses = camera.extend((("w",) if index % 4 else ("w", "l"),) * session.plan.latent_frames)
        plan = ChunkPlan(session.plan.session_id, index, session.plan.prompt, poses, None)
        begun = time.perf_counter()
        run_chunk(pipeline, session, plan, lambda group: None)
        spent.append(1000 * (time.perf_counter() - begun))
    return spent


@torch.inference_mode()
def measure(pipeline: Pipeline, plan: SessionPlan, chunks: int, back: int) -> list[str]:
    """One row of the table."""
    clock = Clock(pipeline.device)
    session = SessionState(pipeline, plan)
    steady = chunks_ms(pipeline, session, chunks)[-back:]
    row = [f"{median(steady):.0f}"]
    if pipeline.history_bytes == 0:
        return row + ["-"] * 8
    newest = session.history.newest
    assert newest is not None
    with clock.step("save"):
        data = to_bytes(world_parts(pipeline, session, ""))
    with clock.step("go back"):
        set_back(pipeline, session, session.history.go_back(0, chunks - back, keep=True), chunks - back)
    for off in ("first off", "off"):
        with clock.step(off):
            session.move(HOST)
        with clock.step("return"):
            session.move(pipeline.device)
    session.release()
    with clock.step("open"):
        session = SessionState(pipeline, plan)
    with clock.step("load"):
        go_on_from(pipeline, session, read_snapshot(pipeline, plan, data))
    seconds = clock.seconds
    return [
        *row,
        f"{newest.nbytes / MB:.2f}",
        f"{len(data) / MB:.1f}",
        *(f"{seconds[name]:.2f}" for name in ("save", "go back", "first off", "off", "return")),
        f"{seconds['open'] + seconds['load']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="builtin, a diffusers folder or a hub id")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--size", type=frame_size, help="frame size (default: the model's)")
    parser.add_argument("--window", type=int, help="latent frames in the window (default: the model's)")
    parser.add_argument("--more", type=int, default=4, help="chunks after the window is full")
    parser.add_argument("--back", type=int, default=2, help="chunks to go back by")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as of serve")
    parser.add_argument("--quantization", default="none", help="as of serve")
    args = parser.parse_args()
    config = ServeConfig(
        model_path=args.model,
        load_format=args.load_format,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
    )
    pipeline = load_pipeline(config, lambda status: None)
    plan = default_plan(pipeline)
    size = args.size or plan.size
    picture = decode_picture(start_picture(), size)
    plan = replace(plan, size=size, first_frame=picture, window_frames=args.window or plan.window_frames)
    chunks = -(-plan.window_frames // plan.latent_frames) + args.more
    setups: dict[str, Callable[[], Pipeline]] = {
        "without": lambda: replace(pipeline, history_bytes=0),
        "latents": lambda: replace(pipeline, history_bytes=2**34),
        "keys and values": lambda: replace(pipeline, history_bytes=2**36, keeps_kv=True),
    }
    print(f"{args.model}, {size}, window {plan.window_frames}, {pipeline.model_info.device}")
    heads = (
        *("history", "chunk ms", "MB a chunk", "file MB", "save s", "go back s"),
        *("first off s", "off s", "return s", "from file s"),
    )
    rows = []
    for name, made in setups.items():
        rows.append([name, *measure(made(), plan, chunks, args.back)])
        print("measured:", *rows[-1], flush=True)
    print(table(heads, rows))


if __name__ == "__main__":
    main()
