"""Measures upscaling and interpolation: ms per decoded frame, and on a GPU their peak memory.

python scripts/bench_postprocess.py [--size 832x480] [--device auto] [--threads 1] [--frames 4] [--only exp1,x4]

At 16 fps there are 62.5 ms per decoded frame for everything.
"""

from __future__ import annotations

import argparse
import time

import torch

from lingbot_rt.postprocess.stage import PostprocessNetworks
from lingbot_rt.session.plan import PostprocessPlan
from lingbot_rt.shapes import FrameSize

CASES = {
    "exp1": PostprocessPlan(interpolation_exp=1),
    "exp1-half": PostprocessPlan(interpolation_exp=1, interpolation_scale=0.5),
    "exp2": PostprocessPlan(interpolation_exp=2),
    "x2": PostprocessPlan(upscaling_scale=2),
    "x4": PostprocessPlan(upscaling_scale=4),
    "x4-exp1": PostprocessPlan(upscaling_scale=4, interpolation_exp=1),
}


def moving(count: int, size: FrameSize, start: int, device: torch.device) -> torch.Tensor:
    """uint8 [count, H, W, 3]: coarse random cells that move 5 pixels per frame."""
    cells = torch.randint(0, 256, (size.height // 16 + 1, size.width // 16 + 64, 3), dtype=torch.uint8)
    cells = cells.repeat_interleave(16, 0).repeat_interleave(16, 1)
    views = [cells[: size.height, 5 * (start + i) : 5 * (start + i) + size.width] for i in range(count)]
    return torch.stack(views).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=FrameSize.parse, default=FrameSize(832, 480))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=4, help="decoded frames per call; a latent frame has 4")
    parser.add_argument("--rounds", type=int, default=2, help="calls to measure (default: %(default)s)")
    parser.add_argument("--only", default=",".join(CASES), help=f"cases to run (default: {','.join(CASES)})")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {args.threads} thread(s)"
    print(
        f"{name}, torch {torch.__version__}, {args.size}, {args.frames} decoded frames per call, {args.rounds} rounds"
    )
    networks = PostprocessNetworks(device)
    for case in args.only.split(","):
        stage = networks.open(CASES[case], args.size)
        if cuda:
            networks.warm_up(CASES[case], args.size)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        stage.process(moving(1, args.size, 0, device))
        if cuda:
            torch.cuda.synchronize()
        stage.take_timings()
        wall = []
        for i in range(args.rounds):
            frames = moving(args.frames, args.size, 0 if i % 2 else 1, device)
            begin = time.perf_counter()
            out = stage.process(frames)
            if cuda:
                torch.cuda.synchronize()
            wall.append(1000 * (time.perf_counter() - begin) / args.frames)
        parts = {key: ms / (args.rounds * args.frames) for key, ms in stage.take_timings().items()}
        split = ", ".join(f"{key} {ms:.2f}" for key, ms in parts.items())
        line = f"{case:10} {min(wall):9.2f} ms per decoded frame at best (mean: {split}), {len(out)} frames out"
        if cuda:
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            line += f", peak {peak:.0f} MB for {stage.memory_bytes() / 1e6:.0f} planned"
        print(f"{line} of {stage.size_out}", flush=True)


if __name__ == "__main__":
    main()
