"""A session without a socket: an init or a saved world in, frames out, by the server's own state machine and engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lingbot_rt.config import ServeConfig
from lingbot_rt.server.first_frame import decode_picture
from lingbot_rt.server.live_session import SavedSession, about
from lingbot_rt.session.messages import Event, Init
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, EnginePort
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.session.world_file import read_world


@dataclass(frozen=True, slots=True)
class OfflineChunk:
    """One finished chunk."""

    plan: ChunkPlan
    result: ChunkResult
    frames: npt.NDArray[np.uint8]  # [n, H, W, 3]


async def play(
    engine: EnginePort,
    config: ServeConfig,
    init: Init,
    session_id: str = "offline",
    reopen_before: Collection[int] = (),
) -> AsyncIterator[OfflineChunk]:
    """Runs a started engine through the session that ``init`` asks for; its ``max_chunks`` ends it.

    ``init.first_frame`` must be the bytes of a picture. Before the chunks ``reopen_before`` the session becomes a file,
    is closed, and goes on from the file. Raises InvalidInit, CapacityError or EngineFailed.
    """
    session = Session(session_id, resolve(init, engine.model_info, config))
    await engine.open(
        session.settings.session_plan(session_id, decode_picture(init.first_frame, session.settings.size))
    )
    try:
        for boundary in (*sorted(reopen_before), None):
            async for chunk in _chunks(engine, session, boundary):
                yield chunk
            if not session.is_complete:
                session = await _reopened(engine, config, session, init)
    finally:
        await engine.close(session_id)


async def go_on(
    engine: EnginePort, config: ServeConfig, world: bytes, events: Iterable[Event], chunks: int
) -> AsyncIterator[OfflineChunk]:
    """Runs a started engine on from a saved world, for ``chunks`` chunks. ``events`` come before the first of them.

    Raises InvalidInit for a file that cannot go on here, InvalidEvent, CapacityError or EngineFailed.
    """
    file = read_world(world)
    saved = SavedSession.of(file, engine.model_info, config)
    settings = replace(saved.settings, max_chunks=file.chunk_index + chunks, extensions=frozenset())
    session = Session.restored("offline", settings, saved.control | {"is_paused": False})
    for event in events:
        session.receive(event, time.monotonic())
    await engine.open(settings.session_plan(session.id, saved.first_frame), world)
    try:
        async for chunk in _chunks(engine, session):
            yield chunk
    finally:
        await engine.close(session.id)


async def _chunks(engine: EnginePort, session: Session, boundary: int | None = None) -> AsyncIterator[OfflineChunk]:
    """Of a session that is open on the engine, up to a boundary or to its end."""
    while not session.is_complete and session.next_index != boundary:
        chunk = session.next_chunk(time.monotonic()).plan
        run = engine.run(chunk)
        groups = [group.pixels async for group in run]
        yield OfflineChunk(chunk, run.result, np.concatenate(groups))


async def _reopened(engine: EnginePort, config: ServeConfig, session: Session, init: Init) -> Session:
    """The session, closed and gone on from its file."""
    world = await engine.snapshot(session.id, about(session, init))
    await engine.close(session.id)
    saved = SavedSession.of(read_world(world), engine.model_info, config)
    await engine.open(saved.settings.session_plan(session.id, saved.first_frame), world)
    return Session.restored(session.id, saved.settings, saved.control)
