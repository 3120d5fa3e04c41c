"""Every shape of a default session is run once before /health says ready."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lingbot_rt.engine.chunk_plan import ChunkPlan, SessionPlan
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.postprocess.plan import PostprocessPlan


def warm_up(pipeline: Pipeline, report: Callable[[float], None], *, postprocess: bool = False) -> None:
    """Runs a default session until its window has slid once, with a prompt change; ``report`` gets the share done.

    ``postprocess`` adds the upscaling and interpolation networks at their usual factors.
    """
    card = pipeline.card
    plan = SessionPlan(
        session_id="warm-up",
        prompt="a quiet street",
        first_frame=np.full((card.default_size.height, card.default_size.width, 3), 127, np.uint8),
        size=card.default_size,
        latent_frames=card.latent_frames,
        seed=0,
        num_steps=card.num_steps,
        guidance_scale=1.0,
        negative_prompt="",
        sink_frames=card.sink_frames,
        window_frames=card.window_frames,
    )
    session = SessionState(pipeline, plan)
    chunks = -(-plan.window_frames // plan.latent_frames) + 1
    still = np.broadcast_to(np.eye(4), (plan.latent_frames, 4, 4))
    for index in range(chunks):
        prompt = plan.prompt if index < chunks - 1 else "a quiet street at night"
        run_chunk(pipeline, session, ChunkPlan(plan.session_id, index, prompt, still, None), lambda group: None)
        report((index + 1) / chunks)
    if postprocess:
        usual = PostprocessPlan(upscaling_scale=4, interpolation_exp=1)
        pipeline.postprocess.warm_up(usual, card.default_size)
