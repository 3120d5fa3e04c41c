"""Measures the cost of recording a chunk: queueing it, and the time the engine's thread loses to the writer's thread.

python scripts/bench_record.py [--size 832x480] [--chunks 40]

The main thread stands in for the engine and launches small torch operations for about as long as the writer works. Its
time is measured alone, while the writer records a chunk, and beside a thread that only hashes the same bytes without
holding the interpreter lock. If there are too few cores, the last two lose the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lingbot_rt.recording.session_record import SessionRecorder
from lingbot_rt.session.plan import ModelInfo
from lingbot_rt.shapes import FrameSize

_LAUNCHES = 20_000


def pictures(size: FrameSize, count: int) -> npt.NDArray[np.uint8]:
    """uint8 [count, H, W, 3]: coarse noise with grain, about as hard to compress as a film."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (size.height // 16 + 1, size.width // 16 + 1, 3))
    smooth = coarse.repeat(16, 0).repeat(16, 1)[: size.height, : size.width]
    grain = random.integers(-3, 4, (count, size.height, size.width, 3))
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def launches_ms() -> float:
    """Time of many small torch operations in this thread."""
    x = torch.zeros(1024)
    begin = time.perf_counter()
    for _ in range(_LAUNCHES):
        x.add_(1)
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=FrameSize.parse, default=FrameSize(832, 480))
    parser.add_argument("--chunks", type=int, default=40, help="chunks to record (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    frames = list(pictures(args.size, 12).reshape(3, 4, args.size.height, args.size.width, 3))
    model_info = ModelInfo("bench", "bench", args.size, 3, 3, 9, 4, "cpu", "float32")
    queueing, written, alone, beside, control = [], [], [], [], []
    raw = b"".join(group.tobytes() for group in frames)
    with tempfile.TemporaryDirectory() as folder:
        recorder = SessionRecorder(Path(folder), "bench", {"seed": 1}, b"", model_info, 2**33)
        for index in range(args.chunks):
            alone.append(launches_ms())
            begin = time.perf_counter()
            recorder.chunk(index, [], None, frames, {"chunk_total_ms": 750})
            queueing.append(1000 * (time.perf_counter() - begin))
            beside.append(launches_ms())
            while recorder.waiting:
                time.sleep(0.001)
            hashing = threading.Thread(target=hashlib.sha256, args=(raw,))
            hashing.start()
            control.append(launches_ms())
            hashing.join()
            begin = time.process_time()
            recorder.chunk(args.chunks + index, [], None, frames, {"chunk_total_ms": 750})
            while recorder.waiting:
                time.sleep(0.001)
            written.append(1000 * (time.process_time() - begin))
        recorder.close("bench over")
    print(f"{args.size}, {args.chunks} chunks of 12 frames")
    p95 = sorted(queueing)[int(0.95 * len(queueing))]
    print(f"queueing       p50 {statistics.median(queueing):.3f} ms, p95 {p95:.3f} ms")
    print(f"writer thread  p50 {statistics.median(written):.1f} ms of CPU time per chunk")
    lost, lost_to_hashing = (statistics.median(times) - statistics.median(alone) for times in (beside, control))
    print(f"engine thread  p50 {lost:+.2f} ms per chunk; {lost_to_hashing:+.2f} ms beside a thread that only hashes")


if __name__ == "__main__":
    main()
