"""Runs every shape that a session can meet: of the default size before /health says ready, of others when one opens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.compilation import tuned_convolutions
from lingbot_rt.engine.memory import fits, release_unused
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import UnsoundFrames
from lingbot_rt.models.vae import STEADY_FROM
from lingbot_rt.session.interactive_window import recent_frames
from lingbot_rt.session.plan import UNCHANGED, ChunkPlan, FrameGroup, PostprocessPlan, SessionPlan

log = logging.getLogger(__name__)

_GUIDED_CHUNKS = 2


@tuned_convolutions()
def warm_up(pipeline: Pipeline, report: Callable[[float], None], *, postprocess: bool = False) -> bool:
    """Runs a default session until its window has slid once, then a chunk for each length of the interactive window
    that was not met on the way, then one with a new prompt and no camera, then two chunks of a session with guidance.
    ``report`` gets the share done, 0 to 1.

    If the model's own window does not fit, it takes the largest that does. ``postprocess`` adds the upscaling and
    interpolation networks at their usual factors. Returns whether anything fitted at all.
    """
    plan = _fitting(pipeline, default_plan(pipeline))
    if plan is None:
        log.warning("no warm-up: a session of %s does not fit in the free memory", pipeline.model_info.default_size)
        return False
    plan = replace(plan, recent_frames=recent_frames(plan.sink_frames, plan.window_frames, plan.latent_frames))
    guided = replace(plan, guidance_scale=2.0, recent_frames=(), window_frames=plan.sink_frames + plan.latent_frames)
    guided_chunks = _GUIDED_CHUNKS if fits(pipeline, guided) else 0
    sliding = -(-plan.window_frames // plan.latent_frames) + 1
    met = {min(plan.latent_frames * (index + 1), plan.window_frames) for index in range(sliding)}
    beside = plan.sink_frames + plan.latent_frames
    narrow = [recent for recent in sorted(set(plan.recent_frames)) if recent + beside not in met]
    total, done = sliding + len(narrow) + 1 + guided_chunks, 0
    still = np.broadcast_to(np.eye(4), (plan.latent_frames, 4, 4))

    def run(session: SessionState, index: int, prompt: str, *, camera: bool = True, recent: int | None = None) -> None:
        nonlocal done
        chunk = ChunkPlan(session.plan.session_id, index, prompt, still if camera else None, None, recent_frames=recent)
        run_chunk(pipeline, session, chunk, _nowhere)
        done += 1
        report(done / total)

    session = SessionState(pipeline, plan)
    for index in range(sliding):
        run(session, index, plan.prompt)
    for index, recent in enumerate(narrow, start=sliding):
        run(session, index, plan.prompt, recent=recent)
    run(session, sliding + len(narrow), "a quiet street at night", camera=False)
    del session  # before another window is allocated
    if guided_chunks:
        session = SessionState(pipeline, guided)
        for index in range(guided_chunks):
            run(session, index, plan.prompt)
    if postprocess:
        usual = PostprocessPlan(upscaling_scale=4, interpolation_exp=1)
        pipeline.postprocess.warm_up(usual, plan.size)
    return True


@tuned_convolutions()
def warm_up_shape(
    pipeline: Pipeline, plan: SessionPlan, opened: Callable[[SessionState], None] = lambda session: None
) -> None:
    """Runs the few chunks in which a session of the size and latent frames of ``plan`` would compile.

    ``opened`` gets the session that runs them. Cancelling it makes this raise ChunkCancelled before the next forward
    or decode; a compilation in work is not interrupted.
    """
    # What compiles depends on neither window, steps nor guidance: the smallest will do.
    window = plan.sink_frames + plan.latent_frames
    short = replace(plan, window_frames=window, num_steps=1, guidance_scale=1.0, postprocess=UNCHANGED)
    session = SessionState(pipeline, short)
    still = np.broadcast_to(np.eye(4), (plan.latent_frames, 4, 4))
    # One more latent frame than the first steady one, and in the last chunk no camera.
    chunks = max(2, -(-(STEADY_FROM + 2) // plan.latent_frames))
    try:
        opened(session)
        for index in range(chunks):
            poses = None if index == chunks - 1 else still
            with suppress(UnsoundFrames):  # for the session's own chunks to tell
                run_chunk(pipeline, session, ChunkPlan(plan.session_id, index, plan.prompt, poses, None), _nowhere)
    finally:
        session.release()
        release_unused(pipeline.device)


class LimitedWarmUp:
    """``warm_up_shape`` within a time limit. ``run`` is called on the engine thread, ``stop`` on any."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.is_late = False  # the limit ended it
        self._is_stopped = threading.Event()
        self._session: SessionState | None = None

    def run(self, pipeline: Pipeline, plan: SessionPlan, limit_s: float) -> None:
        """Raises ChunkCancelled after ``limit_s`` or ``stop``, as soon as the compilation in work has ended."""
        timer = threading.Timer(limit_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            warm_up_shape(pipeline, plan, self._opened)
        finally:
            timer.cancel()
            self._session = None

    def stop(self) -> None:
        self._is_stopped.set()
        session = self._session
        if session is not None:
            session.cancel()

    def _opened(self, session: SessionState) -> None:
        self._session = session
        # Whoever called `stop` before saw no session.
        if self._is_stopped.is_set():
            session.cancel()

    def _expire(self) -> None:
        self.is_late = True
        self.stop()


def _nowhere(group: FrameGroup) -> None:
    """Where the frames of a warm-up go."""


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
    """``plan`` with the largest window that fits on every rank, or None."""
    for window in range(plan.window_frames, plan.sink_frames + plan.latent_frames - 1, -plan.latent_frames):
        smaller = replace(plan, window_frames=window)
        if fits(pipeline, smaller):
            return smaller
    return None
