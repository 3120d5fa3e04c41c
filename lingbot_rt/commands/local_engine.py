"""An engine inside a command's own process: device checks, progress bars while it loads, and its shutdown."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lingbot_rt.commands.options import add_config_options, add_server_options, api_key_from, config_from
from lingbot_rt.commands.output import note
from lingbot_rt.config import ServeConfig
from lingbot_rt.config_values import environment_value, flag
from lingbot_rt.errors import ConfigError, reason_of
from lingbot_rt.models.model_path import DUMMY, local_folder, require_parts

if TYPE_CHECKING:
    from lingbot_rt.regression.session_runner import SessionRunner
    from lingbot_rt.session.plan import EnginePort, EngineStatus

log = logging.getLogger(__name__)

_POLL_S = 0.1
_BAR_FORMAT = "{desc:<32} {bar:30} {percentage:3.0f} %  {elapsed}"


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that ``open_runner`` reads: --url, or the model and device of an engine in this process."""
    add_server_options(parser, default_url=None)
    add_config_options(parser, ("model", "device"), also=("max_pixels", "postprocess_model_dir"))


@asynccontextmanager
async def open_runner(args: argparse.Namespace) -> AsyncIterator[SessionRunner]:
    """Runs sessions on the server at --url, or on an engine in this process that stops at the end."""
    from lingbot_rt.regression.session_runner import EngineRunner, ServerRunner

    if args.url:
        yield await asyncio.to_thread(ServerRunner, args.url, api_key_from(args))
        return
    config = config_from(args)
    require_folders(config)
    require_devices(config)
    async with started_engine(config) as engine:
        yield EngineRunner(engine, config)


@asynccontextmanager
async def started_engine(config: ServeConfig) -> AsyncIterator[EnginePort]:
    """A ready engine that stops at the end. Shows progress bars while it loads."""
    from lingbot_rt.engine.engine import Engine

    engine = Engine(config)
    try:
        with StartupBars() as bars:
            await bars.follow(engine, asyncio.ensure_future(engine.start()))
        yield engine
    finally:
        await engine.stop()


def require_devices(config: ServeConfig) -> None:
    """Raises ConfigError if --num-gpus asks for more devices than there are, or does not divide the heads."""
    if config.num_gpus == 1 and environment_value("WORLD_SIZE") is None:
        return
    from lingbot_rt.parallel.launch import require_ranks

    require_ranks(config)


def require_folders(config: ServeConfig) -> None:
    """Raises ConfigError if a configured folder can't be used, CheckpointError if the model's is none.

    Creates those that are written. Says then that the start goes on: importing torch takes seconds.
    """
    for name, mode, verb in (
        ("first_frame_dir", os.R_OK | os.X_OK, "read"),
        ("postprocess_model_dir", os.R_OK | os.X_OK, "read"),
        ("record_dir", os.W_OK | os.X_OK, "written"),
        ("park_dir", os.W_OK | os.X_OK, "written"),
        ("profile_dir", os.W_OK | os.X_OK, "written"),
        ("compile_cache", os.W_OK | os.X_OK, "written"),
    ):
        folder = getattr(config, name)
        if folder is None:
            continue
        if verb == "written" and not os.path.lexists(folder):
            try:
                Path(folder).mkdir(parents=True)
            except OSError as error:
                raise ConfigError(f"{flag(name)} {folder}: {reason_of(error)}", field=name) from None
        if not os.path.isdir(folder):
            found = "it is a file" if os.path.lexists(folder) else "it does not exist"
            raise ConfigError(f"{flag(name)} {folder}: expected a folder, but {found}", field=name)
        if not os.access(folder, mode):
            raise ConfigError(f"{flag(name)} {folder}: the folder cannot be {verb}", field=name)
    dummy = config.load_format == DUMMY
    if (path := local_folder(config.model_path, dummy=dummy)) is not None:
        require_parts(path, dummy=dummy)
    if "torch" not in sys.modules:
        note("lingbot-rt: starting, this takes some seconds")


def bar_size() -> dict[str, int]:
    """Options of tqdm. It draws nothing on a terminal that reports 0 x 0; shutil falls back to 80 x 24."""
    size = shutil.get_terminal_size()
    return {"ncols": size.columns, "nrows": size.lines}


class StartupBars:
    """One progress bar per loading stage, one after the other. Without a terminal: one log line per stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm | None = None

    async def follow(self, engine: EnginePort, until: asyncio.Future[None]) -> None:
        """Shows the engine's status until it is ready or ``until`` is done. Raises what ``until`` raised."""
        while not engine.status.ready and not until.done():
            self.show(engine.status)
            await asyncio.wait([until], timeout=_POLL_S)
        if until.done():
            await until

    def show(self, status: EngineStatus) -> None:
        stage = f"{status.stage}: {status.detail}" if status.detail else status.stage
        if stage != self._stage:
            self._finish()
            self._stage = stage
            if status.progress is not None:
                self._bar = tqdm(total=1.0, desc=stage, bar_format=_BAR_FORMAT, disable=None, **bar_size())
                if self._bar.disable:
                    log.info("%s", stage)
        if self._bar is not None and status.progress is not None:
            self._bar.n = min(status.progress, 1.0)
            self._bar.refresh()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.n = 1.0
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> StartupBars:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._finish()
        elif self._bar is not None:
            self._bar.close()
