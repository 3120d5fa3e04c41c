"""``lingbot-rt generate``: runs the server's own pipeline without a server and writes the frames to a file."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

from lingbot_rt.commands.local_engine import require_devices, require_folders, started_engine
from lingbot_rt.commands.options import (
    add_config_options,
    config_from,
    require_existing,
    require_no_frames,
    require_session_size,
)
from lingbot_rt.commands.session_options import (
    add_session_options,
    chunks_for,
    first_frame_bytes,
    require_poses_options,
    script_of,
)
from lingbot_rt.config import ServeConfig
from lingbot_rt.shapes import latent_frames_for

if TYPE_CHECKING:
    from lingbot_rt.commands.walk import Walk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_options(parser, default_out="clip.mp4")
    add_config_options(parser, ("model", "device"), also=("interactive_kv_window",))


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.commands.walk import Walk

    require_session_size(args.size)
    require_existing("--first-frame", args.first_frame)
    require_no_frames("--out", args.out, overwrite=args.overwrite)
    config = config_from(args)
    require_poses_options(args)
    conditions, moves = script_of(args)
    chunks = chunks_for(moves, latent_frames_for(args.num_frames), args.chunks)
    require_folders(config)
    require_devices(config)
    with Walk(args.out, args.fps, overwrite=args.overwrite) as walk:
        asyncio.run(_generate(args, config, conditions, chunks, walk))
    return 0


async def _generate(
    args: argparse.Namespace, config: ServeConfig, conditions: dict[str, Any], chunks: int, walk: Walk
) -> None:
    from lingbot_rt.client.protocol import ChunkStats
    from lingbot_rt.commands.walk import frames_of_walk
    from lingbot_rt.offline import play
    from lingbot_rt.session.messages import Init

    latent_frames = latent_frames_for(args.num_frames)
    first_frame = first_frame_bytes(args.first_frame)
    stats: list[ChunkStats] = []
    async with started_engine(config) as engine:
        init = Init(
            prompt=args.prompt,
            first_frame=first_frame,
            size=str(args.size or engine.model_info.default_size),
            fps=args.fps,
            num_frames=args.num_frames,
            seed=args.seed,
            num_inference_steps=args.steps,
            max_chunks=chunks,
            condition_inputs=conditions,
        )
        walk.begin(frames_of_walk(chunks, latent_frames), stats)
        async for chunk in play(engine, config, init):
            timings = chunk.result.timings
            for pixels in chunk.frames:
                walk.add(pixels, chunk.plan.chunk_index)
            stats.append(
                ChunkStats(
                    chunk_index=chunk.plan.chunk_index,
                    num_frames=len(chunk.frames),
                    event_id=None,
                    chunk_total_ms=timings.total_ms,
                    dit_ms=timings.dit_ms,
                    vae_ms=timings.vae_ms,
                    encode_ms=None,
                    window_frames=None,
                    message={},
                )
            )
