"""Bars for what an engine does before it is ready; one log line a stage where no terminal looks on."""

from __future__ import annotations

import asyncio
import logging
import shutil
from typing import TYPE_CHECKING

from tqdm import tqdm

from lingbot_rt.session.plan import EngineStatus

if TYPE_CHECKING:
    from lingbot_rt.session.plan import EnginePort

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_FORM = "{desc:<32} {bar:30} {percentage:3.0f} %  {elapsed}"


class StageBars:
    """One bar after the other, in the order in which the stages come."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm | None = None

    async def follow(self, engine: EnginePort, until: asyncio.Future[None]) -> None:
        """Shows the engine's status until it is ready or ``until`` is done; raises what that raised."""
        while not engine.status.ready and not until.done():
            self.show(engine.status)
            await asyncio.wait([until], timeout=_LOOK_EVERY_S)
        if until.done():
            await until

    def show(self, status: EngineStatus) -> None:
        stage = f"{status.stage}: {status.detail}" if status.detail else status.stage
        if stage != self._stage:
            self._finish()
            self._stage = stage
            if status.progress is not None:
                # tqdm draws nothing where a terminal says it is 0 x 0; the standard library then says 80 x 24.
                size = shutil.get_terminal_size()
                self._bar = tqdm(
                    total=1.0, desc=stage, bar_format=_FORM, ncols=size.columns, nrows=size.lines, disable=None
                )
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

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._finish()
        elif self._bar is not None:
            self._bar.close()
