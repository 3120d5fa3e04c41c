"""What the server asks of an engine. The real one is ``engine/engine.py``; tests bring one without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lingbot_rt.engine.chunk_plan import ChunkPlan, ChunkResult, EngineStatus, FrameGroup, ModelCard, SessionPlan

Emit = Callable[[FrameGroup], None]
"""Takes the frames of one latent frame. Called on the engine's thread: it must not block."""


class EnginePort(Protocol):
    @property
    def card(self) -> ModelCard:
        """What the model is. Raises EngineFailed before it is loaded."""

    @property
    def status(self) -> EngineStatus: ...

    async def start(self) -> None:
        """Loads and warms up; returns when ready."""

    async def stop(self) -> None: ...

    async def open(self, plan: SessionPlan) -> None:
        """Raises CapacityError or InvalidInit when the session cannot be opened."""

    async def run(self, plan: ChunkPlan, emit: Emit) -> ChunkResult:
        """Runs one chunk. Raises ChunkCancelled after ``close`` and EngineFailed when the engine broke."""

    async def close(self, session_id: str) -> None:
        """Interrupts the session's chunk and frees what it held. Idempotent."""
