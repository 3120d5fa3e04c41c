"""What all connections of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import LingbotError
from lingbot_rt.server.admission import Admission
from lingbot_rt.server.parking import Parking
from lingbot_rt.server.turns import Turns
from lingbot_rt.session.plan import EnginePort
from lingbot_rt.telemetry import Metrics
from lingbot_rt.telemetry.tracing import Tracer

Result = TypeVar("Result")

INLINE_BYTES = 2048
"""A larger message is read in a thread, so that no client holds up the others."""


class OpenConnection(Protocol):
    """Of a connection, what the others need."""

    gone: asyncio.Event

    def stop(self) -> None:
        """The server shuts down, or its engine is lost."""

    @property
    def state(self) -> str | None:
        """One of ``metrics.SESSION_STATES``; None without a session."""

    @property
    def outbox_bytes(self) -> int:
        """Bytes of messages that the socket has not taken yet."""


@dataclass(eq=False)
class Service:
    config: ServeConfig
    engine: EnginePort
    admission: Admission
    metrics: Metrics
    encoders: Executor
    parking: Parking
    turns: Turns
    readers: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="read"))
    connections: set[OpenConnection] = field(default_factory=set)
    sessions_over: int = 0  # connections that are gone and had a session
    tracer: Tracer | None = None
    failure: LingbotError | None = None  # why there is no engine

    def show_metrics(self) -> None:
        """Sets the metrics that say how things are now."""
        metrics, status = self.metrics, self.engine.status
        metrics.ready.set(status.ready)
        states = [connection.state for connection in self.connections]
        metrics.show_sessions([*states, *["parked"] * self.parking.count])
        metrics.show_memory(sum(each.outbox_bytes for each in self.connections), self.engine.memory_bytes)
        metrics.parked_bytes.set(self.parking.nbytes)
        if status.ready:
            metrics.show_model(self.engine.model_info)

    async def close_all(self, limit_s: float) -> None:
        """Every client gets its error and its close. Returns when all are gone, after ``limit_s`` at the latest."""
        leaving = list(self.connections)
        for connection in leaving:
            connection.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for connection in leaving:
                    await connection.gone.wait()

    async def aside(self, size: int, work: Callable[..., Result], *args: object) -> Result:
        """Calls ``work``, in a thread if the message it is about is large."""
        if size <= INLINE_BYTES:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self.readers, work, *args)
