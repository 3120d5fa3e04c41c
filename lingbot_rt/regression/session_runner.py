"""Runs a scripted session on a server or on an engine in this process, and yields its chunks one by one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from lingbot_rt.client import connect
from lingbot_rt.client.server_info import fetch_model_info
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import PlayFailed
from lingbot_rt.offline import play
from lingbot_rt.regression.cases import CaseEvent
from lingbot_rt.session.messages import WIRE_SIZE, Init, decode
from lingbot_rt.session.plan import EnginePort


@dataclass(frozen=True, slots=True)
class Origin:
    """Where frames were made. Times are compared only if all fields are equal."""

    how: str  # "in process" or "over the wire"
    model: str
    device: str
    dtype: str

    def expects_same_bytes(self, other: Origin) -> bool:
        """Whether frames must be equal byte for byte: ``how`` does not matter."""
        return (self.model, self.device, self.dtype) == (other.model, other.device, other.dtype)

    def __str__(self) -> str:
        return f"{self.model} on {self.device}, {self.dtype}, {self.how}"


@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """One chunk of a session."""

    frames: npt.NDArray[np.uint8]  # [n, H, W, 3]
    stats: dict[str, Any]  # fields of chunk_stats; in process only the engine's times
    event_id: int | None


class SessionRunner(Protocol):
    """Runs scripted sessions, one at a time."""

    @property
    def origin(self) -> Origin: ...

    def run(self, init: dict[str, Any], reopen_before: Collection[int] = ()) -> AsyncIterator[ChunkOutput]:
        """Every chunk of a ``scripted_init``. Raises LingbotError if the session is refused or fails.

        In one process the session is saved before the chunks ``reopen_before``, and goes on from the file.
        """


_LEFT_OUT = {"output_compression", "realtime_preview_max_width", "record"}
_SERVERS_OWN = {"interactive_kv_window": False}


def scripted_init(init: dict[str, Any], events: Iterable[CaseEvent], chunks: int) -> dict[str, Any]:
    """The init of a session of ``chunks`` chunks with each event pinned to its chunk. Frames come raw.

    What changes the frames and an init may leave to the server is off unless ``init`` says otherwise.
    """
    given = _SERVERS_OWN | init
    return {key: value for key, value in given.items() if key not in _LEFT_OUT} | {
        "type": "init",
        "max_chunks": chunks,
        "pinned_events": [msgspec.to_builtins(event) for event in events],
        "protocol_extensions": ["pinned_events"],
        "realtime_output_format": "raw",
        "realtime_output_pacing": False,
    }


class ServerRunner:
    """Runs sessions on a server. Raises ConnectFailed if nothing answers at ``url``."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._api_key = api_key
        served = fetch_model_info(url, api_key)
        fields = (str(served.get(name, "unknown")) for name in ("id", "device", "dtype"))
        self.origin = Origin("over the wire", *fields)

    async def run(self, init: dict[str, Any], reopen_before: Collection[int] = ()) -> AsyncIterator[ChunkOutput]:
        # The client would ask the server for its size. A scripted init means the wire's.
        fields = {"size": WIRE_SIZE} | {key: value for key, value in init.items() if key != "type"}
        frames: list[npt.NDArray[np.uint8]] = []
        event_id, index = None, 0
        async with connect(self._url, api_key=self._api_key, script=None, **fields) as session:

            def finished() -> ChunkOutput:
                # A chunk's statistics arrive after its frames and before the next chunk's.
                if not session.stats or session.stats[-1].chunk_index != index:
                    raise PlayFailed(f"chunk {index} arrived without its statistics")
                return ChunkOutput(np.stack(frames), session.stats[-1].message, event_id)

            async for frame in session:
                if frame.chunk_index != index:
                    yield finished()
                    frames.clear()
                event_id, index = frame.event_id, frame.chunk_index
                frames.append(frame.pixels)
            if index != init["max_chunks"] - 1 or not frames:
                raise PlayFailed(f"the session ended after chunk {index} of {init['max_chunks']}")
            yield finished()


class EngineRunner:
    """Runs sessions on a started engine. The statistics are the engine's own times."""

    def __init__(self, engine: EnginePort, config: ServeConfig) -> None:
        self._engine = engine
        self._config = config
        model_info = engine.model_info
        self.origin = Origin("in process", model_info.model_id, model_info.device, model_info.dtype)

    async def run(self, init: dict[str, Any], reopen_before: Collection[int] = ()) -> AsyncIterator[ChunkOutput]:
        message = decode(msgspec.msgpack.encode(init))
        assert isinstance(message, Init)
        async for chunk in play(self._engine, self._config, message, reopen_before=reopen_before):
            timings = chunk.result.timings
            stats = {"chunk_total_ms": timings.total_ms, "dit_ms": timings.dit_ms, "vae_ms": timings.vae_ms}
            yield ChunkOutput(chunk.frames, stats, chunk.plan.event_id)
