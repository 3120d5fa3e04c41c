"""``lingbot-rt replay``: runs a recorded session again and compares every frame."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lingbot_rt.commands import FAILED
from lingbot_rt.commands.local_engine import add_runner_options, open_runner
from lingbot_rt.commands.options import add_frames_option, path_text, real_number, require_existing, require_no_frames
from lingbot_rt.commands.output import say

if TYPE_CHECKING:
    from lingbot_rt.recording.record_file import SessionRecord
    from lingbot_rt.regression.replay import ChunkVerdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("record", type=path_text, metavar="RECORD", help="the session's folder under --record-dir")
    parser.add_argument(
        "--min-psnr",
        type=real_number(0),
        default=40.0,
        metavar="DB",
        help="lowest PSNR at which a chunk that is not exact still passes (default: 40)",
    )
    add_frames_option(parser, "--video", "save the recorded last frame of each chunk beside the replayed frames")
    add_runner_options(parser)


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.recording.record_file import read_record
    from lingbot_rt.regression.replay import table

    require_existing("RECORD", args.record)
    require_no_frames("--video", args.video, overwrite=args.overwrite)
    record = read_record(Path(args.record))
    verdicts = asyncio.run(_replay(args, record))
    say(table(record, verdicts))
    return 0 if all(verdict.passes(args.min_psnr) for verdict in verdicts) else FAILED


async def _replay(args: argparse.Namespace, record: SessionRecord) -> list[ChunkVerdict]:
    from lingbot_rt.commands.frame_writer import open_writer
    from lingbot_rt.regression.replay import compare_chunk, replay_init, side_by_side

    init = replay_init(record)
    verdicts: list[ChunkVerdict] = []
    with (
        open_writer(args.video, record.playback_fps, overwrite=args.overwrite) as write,
        tqdm(total=len(record.chunks), disable=None) as bar,
    ):
        async with open_runner(args) as runner:
            async for chunk in runner.run(init):
                recorded = record.chunks[len(verdicts)]
                verdicts.append(await asyncio.to_thread(compare_chunk, record, recorded, chunk))
                if args.video:
                    for frame in side_by_side(record, recorded, chunk):
                        write(frame)
                bar.update()
    return verdicts
