"""How fast a new prompt reaches the latents, with the window computed again for it and without.

Four sessions of one model have the same noise and keys. One keeps its prompt, three get a new one at the same chunk.
One of these computes its whole window again before that chunk, however long it takes: the table has the distance of the
others' latents from its own, in percent of its norm.

    python scripts/bench_recache.py tests/golden/e2e/model --size 64x64 --window 18 --sink 9
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from lingbot_rt.bench.figures import table
from lingbot_rt.client.start_picture import start_picture
from lingbot_rt.commands.options import frame_size
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.dmd import commit_again
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import default_plan
from lingbot_rt.server.first_frame import decode_picture
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, SessionPlan

KEPT, SWITCHED, RECACHED, AT_ONCE = "prompt kept", "switched", "with recache", "at once"


@torch.inference_mode()
def run(pipeline: Pipeline, plan: SessionPlan, how: str, args: argparse.Namespace) -> list[tuple[Tensor, float]]:
    """Latents and DiT milliseconds of each chunk from the switch on."""
    session, camera, found = SessionState(pipeline, plan), CameraPath(), []
    for index in range(args.before + args.chunks):
        is_new = how != KEPT and index >= args.before
        prompt = args.to if is_new else plan.prompt
        recache = how in (RECACHED, AT_ONCE) and index == args.before
        if how == AT_ONCE and recache:
            text_kv, recache = session.text_kv(prompt), False
            session.recache.begin(session.history.window())
            while (past := session.recache.next()) is not None:
                commit_again(pipeline, session, past, text_kv)
        poses = camera.extend((("w",),) * plan.latent_frames)
        chunk = ChunkPlan(plan.session_id, index, prompt, poses, None, recache=recache)
        dit_ms = run_chunk(pipeline, session, chunk, lambda group: None).timings.dit_ms
        newest = session.history.newest
        assert newest is not None
        found.append((newest.latents.double(), dit_ms))
    return found[args.before :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="builtin, a diffusers folder or a hub id")
    parser.add_argument("--size", type=frame_size, help="frame size (default: the model's)")
    parser.add_argument("--window", type=int, help="latent frames in the window (default: the model's)")
    parser.add_argument("--sink", type=int, help="latent frames of its sink (default: the model's)")
    parser.add_argument("--before", type=int, default=16, help="chunks before the switch")
    parser.add_argument("--chunks", type=int, default=10, help="chunks from the switch on")
    parser.add_argument("--prompt", default="A quiet street.", help="the first prompt")
    parser.add_argument("--to", default="A storm at sea, dark clouds.", help="the new prompt")
    args = parser.parse_args()
    pipeline = load_pipeline(ServeConfig(model_path=args.model), lambda status: None)
    plan = default_plan(pipeline)
    size = args.size or plan.size
    plan = replace(
        plan,
        prompt=args.prompt,
        size=size,
        first_frame=decode_picture(start_picture(), size),
        window_frames=args.window or plan.window_frames,
        sink_frames=plan.sink_frames if args.sink is None else args.sink,
    )
    runs = {how: run(pipeline, plan, how, args) for how in (KEPT, SWITCHED, RECACHED, AT_ONCE)}
    shown = (KEPT, SWITCHED, RECACHED)
    rows = []
    for index, (goal, _) in enumerate(runs[AT_ONCE]):
        distances = [((runs[how][index][0] - goal).norm() / goal.norm()).item() for how in shown]
        times = [runs[how][index][1] for how in (SWITCHED, RECACHED)]
        rows.append([str(index), *(f"{100 * each:.2f} %" for each in distances), *(f"{each:.0f}" for each in times)])
    print(f"{args.model}, {size}, window {plan.window_frames}, sink {plan.sink_frames}, {pipeline.model_info.device}")
    print(table(("chunk", *shown, "DiT ms, switched", "with recache"), rows))


if __name__ == "__main__":
    main()
