"""``lingbot-rt generate``: the server's own pipeline without a server, into a file."""

from __future__ import annotations

import argparse
import asyncio

from tqdm import tqdm

from lingbot_rt.commands.clip import Clip, open_clip
from lingbot_rt.commands.devices import require_devices
from lingbot_rt.commands.options import add_config_options, config_from
from lingbot_rt.commands.player import started_engine
from lingbot_rt.commands.walk import add_walk_options, chunks_for, first_picture, parse_keys, parse_size
from lingbot_rt.config import ServeConfig
from lingbot_rt.shapes import latent_frames_for, pixel_frames_of_chunk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_walk_options(parser)
    parser.set_defaults(out="clip.mp4")
    add_config_options(parser, ("model", "device"))


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    require_devices(config)
    with open_clip(args.out, args.fps) as clip:
        asyncio.run(_generate(args, config, clip))
    print(args.out)
    return 0


async def _generate(args: argparse.Namespace, config: ServeConfig, clip: Clip) -> None:
    from lingbot_rt.offline import play
    from lingbot_rt.session.messages import Init

    actions = parse_keys(args.keys)
    latent_frames = latent_frames_for(args.num_frames)
    chunks = chunks_for(actions, latent_frames, args.chunks)
    total = sum(pixel_frames_of_chunk(i, latent_frames) for i in range(chunks))
    async with started_engine(config) as engine:
        size = parse_size(args.size) if args.size else engine.model_info.default_size
        init = Init(
            prompt=args.prompt,
            first_frame=first_picture(args.first_frame, size),
            size=str(size),
            fps=args.fps,
            num_frames=args.num_frames,
            seed=args.seed,
            num_inference_steps=args.steps,
            max_chunks=chunks,
            condition_inputs={"camera_actions": actions},
        )
        with tqdm(total=total, unit="frame", disable=None) as bar:
            async for chunk in play(engine, config, init):
                for pixels in chunk.frames:
                    clip.add(pixels)
                    bar.update()
