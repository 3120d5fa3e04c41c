"""Plays a scripted session, over a socket or in this process, and keeps what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from lingbot_rt.client import connect
from lingbot_rt.config import ServeConfig
from lingbot_rt.consistency.cases import CaseEvent
from lingbot_rt.consistency.ground_truth import PlayedCase, PlayedChunk
from lingbot_rt.errors import LingbotError
from lingbot_rt.offline import play
from lingbot_rt.server.engine_port import EnginePort
from lingbot_rt.server.protocol import decode


class PlayFailed(LingbotError):
    """A scripted session did not come to its end."""

    code = "play_failed"


def scripted_init(init: dict[str, Any], events: Iterable[CaseEvent], chunks: int) -> dict[str, Any]:
    """The init of a session of ``chunks`` chunks whose events are pinned to theirs, sent as raw frames."""
    pinned = [
        {"chunk": event.chunk, "kind": event.kind, "payload": event.payload}
        | ({} if event.event_id is None else {"event_id": event.event_id})
        for event in events
    ]
    extensions = sorted({*init.get("protocol_extensions", ()), "pinned_events"})
    return {key: value for key, value in init.items() if key not in _NOT_SCRIPTED} | {
        "type": "init",
        "max_chunks": chunks,
        "pinned_events": pinned,
        "protocol_extensions": extensions,
        "realtime_output_format": "raw",
        "realtime_output_pacing": False,
    }


_NOT_SCRIPTED = {"output_compression", "realtime_preview_max_width"}


def play_over_wire(url: str, init: dict[str, Any], api_key: str | None = None) -> PlayedCase:
    """Plays a ``scripted_init`` at a server. Raises ClientError, or PlayFailed when chunks are missing."""
    fields = {key: value for key, value in init.items() if key != "type"}
    frames: dict[int, list[np.ndarray]] = {}
    ids: dict[int, int | None] = {}
    with connect(url, api_key=api_key, script=None, **fields) as session:
        for frame in session:
            frames.setdefault(frame.chunk_index, []).append(frame.pixels)
            ids[frame.chunk_index] = frame.event_id
        stats = {entry.chunk_index: entry.message for entry in session.stats}
    if sorted(frames) != list(range(init["max_chunks"])) or sorted(stats) != sorted(frames):
        raise PlayFailed(f"{init['max_chunks']} chunks were asked for, {len(frames)} came with {len(stats)} statistics")
    return PlayedCase([PlayedChunk(np.stack(frames[i]), stats[i], ids[i]) for i in sorted(frames)])


async def play_in_process(engine: EnginePort, config: ServeConfig, init: dict[str, Any]) -> PlayedCase:
    """Plays a ``scripted_init`` on a started engine; its statistics are the engine's own times."""
    message = decode(msgspec.msgpack.encode(init))
    played = PlayedCase(model=engine.card.model_id, device=engine.card.device)
    async for chunk in play(engine, config, message):  # type: ignore[arg-type]
        timings = chunk.result.timings
        stats = {
            "chunk_total_ms": timings.total_ms,
            "dit_ms": timings.dit_ms,
            "vae_ms": timings.vae_ms,
            "ws_payload_bytes": chunk.frames.nbytes,
            "window_frames": chunk.result.window_frames,
        }
        played.chunks.append(PlayedChunk(chunk.frames, stats, chunk.plan.event_id))
    return played
