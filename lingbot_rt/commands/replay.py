"""``lingbot-rt replay``: run a recorded session again and compare every frame."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from lingbot_rt.commands.check import DIFFERS, started_engine
from lingbot_rt.commands.options import add_config_options, config_from

if TYPE_CHECKING:
    from lingbot_rt.consistency.ground_truth import PlayedCase
    from lingbot_rt.recording.record_file import SessionRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("record", metavar="RECORD", help="a session's folder under --record-dir")
    parser.add_argument("--url", help="replay on a running server (default: in this process)")
    parser.add_argument("--api-key", metavar="KEY", help="of that server")
    parser.add_argument(
        "--min-psnr",
        type=float,
        default=40.0,
        metavar="DB",
        help="least PSNR of a chunk that is not exact (default: 40)",
    )
    parser.add_argument("--video", metavar="FILE", help="MP4, or a folder: recorded last frame of each chunk | replay")
    add_config_options(parser, ("model", "device"))


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.consistency.replay import compare_with_record, replay_init, table
    from lingbot_rt.recording.record_file import read_record

    record = read_record(Path(args.record))
    played = asyncio.run(_play(args, replay_init(record)))
    verdicts = compare_with_record(record, played)
    print(table(record, verdicts))
    if args.video:
        _write_video(args.video, record, played)
    return 0 if all(verdict.passes(args.min_psnr) for verdict in verdicts) else DIFFERS


async def _play(args: argparse.Namespace, init: dict) -> PlayedCase:
    from lingbot_rt.consistency.play import play_in_process, play_over_wire

    if args.url:
        return await asyncio.to_thread(play_over_wire, args.url, init, args.api_key)
    config = config_from(args)
    async with started_engine(config) as engine:
        return await play_in_process(engine, config, init)


def _write_video(path: str, record: SessionRecord, played: PlayedCase) -> None:
    from lingbot_rt.commands.clip import open_clip
    from lingbot_rt.consistency.replay import side_by_side

    with open_clip(path, float(record.session.init.get("fps", 16))) as clip:
        for frame in side_by_side(record, played):
            clip.add(frame)
