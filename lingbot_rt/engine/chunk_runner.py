"""THE PAGE TO READ: one chunk on the device, from its sampled conditions to frames on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lingbot_rt.engine.dmd import ChunkForward, commit_again, denoise
from lingbot_rt.engine.frame_readback import FrameReadback
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.stage_clock import StageClock
from lingbot_rt.models.transfer import to_host
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, ChunkTimings, FrameGroup


@torch.inference_mode()
def run_chunk(
    pipeline: Pipeline, session: SessionState, plan: ChunkPlan, emit: Callable[[FrameGroup], None]
) -> ChunkResult:
    """Denoises, decodes and commits one chunk. ``emit`` gets the frames of each latent frame when they are on the host.

    Raises ChunkCancelled if the session was closed meanwhile, UnsoundFrames, after the whole chunk, if the networks
    gave NaN, infinite or constant values: those frames are not emitted.
    """
    clock = StageClock(pipeline.device)
    pipeline.ranks.begin_chunk()
    session.limit_window(plan.recent_frames)

    with clock.stage("text"):
        text_kv = session.text_kv(plan.prompt)

    if plan.recache:
        session.recache.begin(session.history.window())
    if (past := session.recache.next()) is not None:
        with clock.stage("recache"):
            commit_again(pipeline, session, past, text_kv)

    with clock.stage("camera"):
        forward = ChunkForward.of(pipeline, session, plan.chunk_index, text_kv, plan.relative_poses, plan.intrinsics)

    with clock.stage("denoise"):
        latents = denoise(forward, pipeline.schedule, session.plan.num_steps, session.draw)

    decoding = pipeline.decoding(session.plan)
    with FrameReadback(pipeline.device, session.postprocessor, emit) as readback:
        readback.check(latents)
        # The frames leave before the context pass. On an accelerator they could be decoded beside it. But both fill the
        # device: a chunk would be 0.5 % shorter, and its first frames would leave in twice the time.
        with decoding.placement.on_device(), clock.stage("vae"):
            for i in range(session.plan.latent_frames):
                session.raise_if_cancelled()
                pixels = decoding.decode(latents[:, :, i : i + 1], session.features)
                if pixels is not None:
                    readback.push(pixels, plan.chunk_index, i, session.plan.latent_frames)

        with clock.stage("context"):
            forward.commit(latents)
            pinned = to_host(latents)

    stages = clock.finish()
    session.keep(plan, pinned.clone(), past)  # the next chunk needs the pinned memory
    total_ms = clock.total_ms
    postprocess = session.postprocessor.take_timings()
    pipeline.ranks.end_chunk(total_ms)
    return ChunkResult(
        chunk_index=plan.chunk_index,
        num_frames=readback.num_frames,
        window_frames=session.cache.visible_frames,
        kept_from=session.history.kept_from() if pipeline.history_bytes else None,
        timings=ChunkTimings(
            prepare_ms=stages["text"] + stages["camera"],
            dit_ms=stages["denoise"] + stages["context"] + stages.get("recache", 0.0),
            vae_ms=stages["vae"] - sum(postprocess.values()),
            postprocess=postprocess,
            total_ms=total_ms,
            stages=stages,
        ),
    )
