"""What recording costs: the time that handing a chunk over takes, and the writer thread's time a chunk.

python scripts/bench_record.py [--size 832x480] [--chunks 40]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from lingbot_rt.engine.chunk_plan import ModelCard
from lingbot_rt.recording.session_record import SessionRecorder
from lingbot_rt.shapes import FrameSize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=FrameSize.parse, default=FrameSize(832, 480))
    parser.add_argument("--chunks", type=int, default=40)
    args = parser.parse_args()
    size = args.size
    y, x = np.mgrid[: size.height, : size.width]
    frames = [
        np.stack([(x + y + 7 * i) % 256, x % 256, y % 256], axis=-1).astype(np.uint8)[None].repeat(4, axis=0)
        for i in range(3)
    ]
    card = ModelCard("bench", "bench", size, 3, 3, 9, 4, "cpu", "float32")
    handed, finished = [], []
    with tempfile.TemporaryDirectory() as folder:
        recorder = SessionRecorder(Path(folder), "bench", {"seed": 1}, b"", card, 2**33)
        for index in range(args.chunks):
            begin = time.perf_counter()
            recorder.chunk(index, [], None, frames, {"chunk_total_ms": 750})
            handed.append(1000 * (time.perf_counter() - begin))
            while recorder.waiting:
                time.sleep(0.001)
            finished.append(1000 * (time.perf_counter() - begin))
        recorder.close("bench over")
    ordered = sorted(handed)
    print(f"{size}, {args.chunks} chunks of 12 frames")
    print(
        f"handing over: p50 {statistics.median(handed):.3f} ms, p95 {ordered[int(0.95 * len(ordered))]:.3f} ms a chunk"
    )
    print(f"writer thread: p50 {statistics.median(finished):.1f} ms a chunk")


if __name__ == "__main__":
    main()
