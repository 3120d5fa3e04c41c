"""What plays sessions for a command: the server at --url, or an engine in this process."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from lingbot_rt.commands.devices import require_devices
from lingbot_rt.commands.options import add_config_options, config_from
from lingbot_rt.commands.progress import StageBars
from lingbot_rt.config import ServeConfig

if TYPE_CHECKING:
    from lingbot_rt.regression.play import Player
    from lingbot_rt.session.plan import EnginePort

DIFFERS = 1
"""Exit code when frames are not what they were."""


def add_player_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="play on a running server (default: in this process)")
    parser.add_argument("--api-key", metavar="KEY", help="of that server")
    add_config_options(parser, ("model", "device"), also=("max_pixels", "postprocess_model_dir"))


@asynccontextmanager
async def open_player(args: argparse.Namespace) -> AsyncIterator[Player]:
    """The player that ``add_player_options`` describe: ready, and stopped at the end."""
    from lingbot_rt.regression.play import EnginePlayer, ServerPlayer

    if args.url:
        yield await asyncio.to_thread(ServerPlayer, args.url, args.api_key)
        return
    config = config_from(args)
    require_devices(config)
    async with started_engine(config) as engine:
        yield EnginePlayer(engine, config)


@asynccontextmanager
async def started_engine(config: ServeConfig) -> AsyncIterator[EnginePort]:
    """An engine that is ready, with bars while it loads; stopped at the end."""
    from lingbot_rt.engine.engine import Engine

    engine = Engine(config)
    try:
        with StageBars() as bars:
            await bars.follow(engine, asyncio.ensure_future(engine.start()))
        yield engine
    finally:
        await engine.stop()
