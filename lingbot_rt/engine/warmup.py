"""Runs every shape that a session of the default size can meet, before /health says ready."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.memory import fits
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.session.plan import ChunkPlan, PostprocessPlan, SessionPlan

log = logging.getLogger(__name__)

_GUIDED_CHUNKS = 2


def warm_up(pipeline: Pipeline, report: Callable[[float], None], *, postprocess: bool = False) -> None:
    """Runs a default session until its window has slid once, then a chunk with a new prompt and no camera, then two
    chunks of a session with guidance. ``report`` gets the share done, 0 to 1.

    If the model's own window does not fit, it takes the largest that does. ``postprocess`` adds the upscaling and
    interpolation networks at their usual factors.
    """
    plan = _fitting(pipeline, default_plan(pipeline))
    if plan is None:
        log.warning("no warm-up: a session of %s does not fit in the free memory", pipeline.model_info.default_size)
        return
    guided = replace(plan, guidance_scale=2.0, window_frames=plan.sink_frames + plan.latent_frames)
    guided_chunks = _GUIDED_CHUNKS if pipeline.ranks.agree(fits(pipeline, guided)) else 0
    sliding = -(-plan.window_frames // plan.latent_frames) + 1
    total, done = sliding + 1 + guided_chunks, 0
    still = np.broadcast_to(np.eye(4), (plan.latent_frames, 4, 4))

    def run(session: SessionState, index: int, prompt: str, camera: bool = True) -> None:
        nonlocal done
        chunk = ChunkPlan(session.plan.session_id, index, prompt, still if camera else None, None)
        run_chunk(pipeline, session, chunk, lambda group: None)
        done += 1
        report(done / total)

    session = SessionState(pipeline, plan)
    for index in range(sliding):
        run(session, index, plan.prompt)
    run(session, sliding, "a quiet street at night", camera=False)
    del session  # before another window is allocated
    if guided_chunks:
        session = SessionState(pipeline, guided)
        for index in range(guided_chunks):
            run(session, index, plan.prompt)
    if postprocess:
        usual = PostprocessPlan(upscaling_scale=4, interpolation_exp=1)
        pipeline.postprocess.warm_up(usual, plan.size)


def default_plan(pipeline: Pipeline) -> SessionPlan:
    """The plan of an init without any settings, with a grey first frame."""
    model_info = pipeline.model_info
    return SessionPlan(
        session_id="warm-up",
        prompt="a quiet street",
        first_frame=np.full((model_info.default_size.height, model_info.default_size.width, 3), 127, np.uint8),
        size=model_info.default_size,
        latent_frames=model_info.latent_frames,
        seed=0,
        num_steps=model_info.num_steps,
        guidance_scale=1.0,
        negative_prompt="",
        sink_frames=model_info.sink_frames,
        window_frames=model_info.window_frames,
    )


def _fitting(pipeline: Pipeline, plan: SessionPlan) -> SessionPlan | None:
    """``plan`` with the largest window that fits, or None. Rank 0 decides for all, as it has the least free memory."""
    for window in range(plan.window_frames, plan.sink_frames + plan.latent_frames - 1, -plan.latent_frames):
        smaller = replace(plan, window_frames=window)
        if pipeline.ranks.agree(fits(pipeline, smaller)):
            return smaller
    return None
