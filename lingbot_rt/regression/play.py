"""Plays a scripted session, over a socket or in this process, and hands out its chunks one by one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from lingbot_rt.client import connect
from lingbot_rt.client.served import served_model
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import PlayFailed
from lingbot_rt.offline import play
from lingbot_rt.regression.cases import CaseEvent
from lingbot_rt.session.messages import Init, decode
from lingbot_rt.session.plan import EnginePort


@dataclass(frozen=True, slots=True)
class Origin:
    """Who made the frames: times are compared only where all of it is the same, bytes where ``makes_the_bytes_of``."""

    how: str  # "in process" or "over the wire"
    model: str
    device: str
    dtype: str

    def makes_the_bytes_of(self, other: Origin) -> bool:
        """Whether equal bytes can be expected: the way to them does not matter."""
        return (self.model, self.device, self.dtype) == (other.model, other.device, other.dtype)

    def __str__(self) -> str:
        return f"{self.model} on {self.device}, {self.dtype}, {self.how}"


@dataclass(frozen=True, slots=True)
class PlayedChunk:
    frames: npt.NDArray[np.uint8]  # [n, H, W, 3]
    stats: dict[str, Any]  # as in chunk_stats, as far as they are known
    event_id: int | None


class Player(Protocol):
    @property
    def origin(self) -> Origin: ...

    def play(self, init: dict[str, Any]) -> AsyncIterator[PlayedChunk]:
        """Every chunk of a ``scripted_init``. Raises LingbotError when it is refused or breaks."""


_NOT_SCRIPTED = {"output_compression", "realtime_preview_max_width", "record"}


def scripted_init(init: dict[str, Any], events: Iterable[CaseEvent], chunks: int) -> dict[str, Any]:
    """The init of a session of ``chunks`` chunks whose events are pinned to theirs, sent as raw frames."""
    return {key: value for key, value in init.items() if key not in _NOT_SCRIPTED} | {
        "type": "init",
        "max_chunks": chunks,
        "pinned_events": [msgspec.to_builtins(event) for event in events],
        "protocol_extensions": ["pinned_events"],
        "realtime_output_format": "raw",
        "realtime_output_pacing": False,
    }


class ServerPlayer:
    """Plays on a running server. Raises ConnectFailed when there is none at ``url``."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._api_key = api_key
        served = served_model(url, api_key)
        known = (str(served.get(name, "unknown")) for name in ("id", "device", "dtype"))
        self.origin = Origin("over the wire", *known)

    async def play(self, init: dict[str, Any]) -> AsyncIterator[PlayedChunk]:
        fields = {key: value for key, value in init.items() if key != "type"}
        frames: list[npt.NDArray[np.uint8]] = []
        event_id, index = None, 0
        async with connect(self._url, api_key=self._api_key, script=None, **fields) as session:

            def finished() -> PlayedChunk:
                # A chunk's statistics stand between its frames and the next one's.
                if not session.stats or session.stats[-1].chunk_index != index:
                    raise PlayFailed(f"chunk {index} came without its statistics")
                return PlayedChunk(np.stack(frames), session.stats[-1].message, event_id)

            async for frame in session:
                if frame.chunk_index != index:
                    yield finished()
                    frames.clear()
                event_id, index = frame.event_id, frame.chunk_index
                frames.append(frame.pixels)
            if index != init["max_chunks"] - 1 or not frames:
                raise PlayFailed(f"{init['max_chunks']} chunks were asked for, chunk {index} was the last that came")
            yield finished()


class EnginePlayer:
    """Plays on a started engine; the statistics are the engine's own times."""

    def __init__(self, engine: EnginePort, config: ServeConfig) -> None:
        self._engine = engine
        self._config = config
        model_info = engine.model_info
        self.origin = Origin("in process", model_info.model_id, model_info.device, model_info.dtype)

    async def play(self, init: dict[str, Any]) -> AsyncIterator[PlayedChunk]:
        message = decode(msgspec.msgpack.encode(init))
        assert isinstance(message, Init)
        async for chunk in play(self._engine, self._config, message):
            timings = chunk.result.timings
            stats = {"chunk_total_ms": timings.total_ms, "dit_ms": timings.dit_ms, "vae_ms": timings.vae_ms}
            yield PlayedChunk(chunk.frames, stats, chunk.plan.event_id)
