"""``lingbot-rt generate``: runs the server's own pipeline without a server and writes the frames to a file."""

from __future__ import annotations

import argparse
import asyncio

from tqdm import tqdm

from lingbot_rt.commands.frame_writer import WriteFrame, open_writer
from lingbot_rt.commands.local_engine import require_devices, require_folders, started_engine
from lingbot_rt.commands.options import add_config_options, config_from, require_existing, require_session_size
from lingbot_rt.commands.output import say
from lingbot_rt.commands.session_options import add_session_options, chunks_for, first_frame_bytes, parse_script
from lingbot_rt.config import ServeConfig
from lingbot_rt.session.controls import Actions
from lingbot_rt.shapes import latent_frames_for, num_frames_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_options(parser, default_out="clip.mp4")
    add_config_options(parser, ("model", "device"))


def run(args: argparse.Namespace) -> int:
    require_session_size(args.size)
    require_existing("--first-frame", args.first_frame)
    config = config_from(args)
    actions = parse_script(args.keys)
    require_folders(config)
    require_devices(config)
    with open_writer(args.out, args.fps) as write:
        asyncio.run(_generate(args, config, actions, write))
    say(args.out)
    return 0


async def _generate(args: argparse.Namespace, config: ServeConfig, actions: Actions, write: WriteFrame) -> None:
    from lingbot_rt.offline import play
    from lingbot_rt.session.messages import Init

    latent_frames = latent_frames_for(args.num_frames)
    chunks = chunks_for(actions, latent_frames, args.chunks)
    async with started_engine(config) as engine:
        size = args.size or engine.model_info.default_size
        init = Init(
            prompt=args.prompt,
            first_frame=first_frame_bytes(args.first_frame, size),
            size=str(size),
            fps=args.fps,
            num_frames=args.num_frames,
            seed=args.seed,
            num_inference_steps=args.steps,
            max_chunks=chunks,
            condition_inputs={"camera_actions": actions},
        )
        with tqdm(total=num_frames_for(chunks * latent_frames), unit="frame", disable=None) as bar:
            async for chunk in play(engine, config, init):
                for pixels in chunk.frames:
                    write(pixels)
                    bar.update()
