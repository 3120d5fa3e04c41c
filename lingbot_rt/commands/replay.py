"""``lingbot-rt replay``: run a recorded session again and compare every frame."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lingbot_rt.commands.player import DIFFERS, add_player_options, open_player

if TYPE_CHECKING:
    from lingbot_rt.recording.record_file import SessionRecord
    from lingbot_rt.regression.replay import ChunkVerdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("record", metavar="RECORD", help="a session's folder under --record-dir")
    parser.add_argument(
        "--min-psnr",
        type=float,
        default=40.0,
        metavar="DB",
        help="least PSNR of a chunk that is not exact (default: 40)",
    )
    parser.add_argument("--video", metavar="FILE", help="MP4, or a folder: recorded last frame of each chunk | replay")
    add_player_options(parser)


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.recording.record_file import read_record
    from lingbot_rt.regression.replay import table

    record = read_record(Path(args.record))
    verdicts = asyncio.run(_replay(args, record))
    print(table(record, verdicts))
    return 0 if all(verdict.passes(args.min_psnr) for verdict in verdicts) else DIFFERS


async def _replay(args: argparse.Namespace, record: SessionRecord) -> list[ChunkVerdict]:
    from lingbot_rt.commands.clip import open_clip
    from lingbot_rt.regression.replay import compare_chunk, replay_init, side_by_side

    init = replay_init(record)
    verdicts: list[ChunkVerdict] = []
    with open_clip(args.video, record.playback_fps) as clip, tqdm(total=len(record.chunks), disable=None) as bar:
        async with open_player(args) as player:
            async for chunk in player.play(init):
                recorded = record.chunks[len(verdicts)]
                verdicts.append(await asyncio.to_thread(compare_chunk, record, recorded, chunk))
                if args.video:
                    for frame in side_by_side(record, recorded, chunk):
                        clip.add(frame)
                bar.update()
    return verdicts
