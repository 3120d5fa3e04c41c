"""A session without a socket: init in, chunks of frames out, by the same state machine and engine as the server's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lingbot_rt.config import ServeConfig
from lingbot_rt.server.first_frame import decode_picture
from lingbot_rt.session.messages import Init
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, EnginePort
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve


@dataclass(frozen=True, slots=True)
class OfflineChunk:
    """One finished chunk."""

    plan: ChunkPlan
    result: ChunkResult
    frames: npt.NDArray[np.uint8]  # [n, H, W, 3]


async def play(
    engine: EnginePort, config: ServeConfig, init: Init, session_id: str = "offline"
) -> AsyncIterator[OfflineChunk]:
    """Runs a started engine through the session that ``init`` asks for; its ``max_chunks`` ends it.

    ``init.first_frame`` must be the bytes of a picture. Raises InvalidInit, CapacityError or EngineFailed.
    """
    session = Session(session_id, resolve(init, engine.model_info, config))
    plan = session.settings.session_plan(session_id, decode_picture(init.first_frame, session.settings.size))
    await engine.open(plan)
    try:
        while not session.is_complete:
            chunk = session.next_chunk(time.monotonic()).plan
            run = engine.run(chunk)
            groups = [group.pixels async for group in run]
            yield OfflineChunk(chunk, run.result, np.concatenate(groups))
    finally:
        await engine.close(session_id)
