"""``lingbot-rt generate``: runs the server's own pipeline without a server and writes the frames to a file."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from lingbot_rt.commands.kept_world import KeptWorld, add_from_option, events_of, kept_world
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
from lingbot_rt.errors import ConfigError, InvalidInit, quoted
from lingbot_rt.shapes import latent_frames_for

if TYPE_CHECKING:
    from lingbot_rt.commands.walk import Walk
    from lingbot_rt.offline import OfflineChunk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_options(parser, default_out="clip.mp4")
    add_from_option(parser)
    add_config_options(parser, ("model", "device"), also=("interactive_kv_window",))


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.commands.walk import Walk

    require_session_size(args.size)
    require_existing("--first-frame", args.first_frame)
    require_no_frames("--out", args.out, overwrite=args.overwrite)
    config = config_from(args)
    require_poses_options(args)
    world = kept_world("--from", args.from_world, args)
    if world is None:
        conditions, moves = script_of(args)
        latent_frames, fps = latent_frames_for(args.num_frames), args.fps
    else:
        events, moves = events_of(args)
        latent_frames, fps = world.latent_frames, world.fps
    chunks = chunks_for(moves, latent_frames, args.chunks)
    require_folders(config)
    require_devices(config)
    with Walk(args.out, fps, overwrite=args.overwrite) as walk:
        if world is None:
            asyncio.run(_generate(args, config, conditions, chunks, walk))
        else:
            try:
                asyncio.run(_go_on(world, config, events, chunks, walk))
            except InvalidInit as error:
                raise ConfigError(f"--from {quoted(args.from_world)}: {error}", field="from") from None
    return 0


async def _generate(
    args: argparse.Namespace, config: ServeConfig, conditions: dict[str, Any], chunks: int, walk: Walk
) -> None:
    from lingbot_rt.commands.walk import frames_of_walk
    from lingbot_rt.offline import play
    from lingbot_rt.session.messages import Init

    first_frame = first_frame_bytes(args.first_frame)
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
        frames = frames_of_walk(chunks, latent_frames_for(args.num_frames))
        await _show(play(engine, config, init), frames, walk)


async def _go_on(world: KeptWorld, config: ServeConfig, events: list[tuple[str, Any]], chunks: int, walk: Walk) -> None:
    from lingbot_rt.offline import go_on
    from lingbot_rt.session.messages import Event

    assert isinstance(world.resume, bytes)
    sent = [Event(kind=kind, payload=payload) for kind, payload in events]
    async with started_engine(config) as engine:
        await _show(go_on(engine, config, world.resume, sent, chunks), world.frames(chunks), walk)


async def _show(chunks: AsyncIterator[OfflineChunk], frames: int, walk: Walk) -> None:
    """Takes the chunks as they come; ``frames`` are expected in all."""
    from lingbot_rt.client.protocol import ChunkStats

    stats: list[ChunkStats] = []
    walk.begin(frames, stats)
    async for chunk in chunks:
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
