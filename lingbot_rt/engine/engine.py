"""The async face of the engine: one thread owns the device, everything that touches it runs there in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_plan import ChunkPlan, ChunkResult, EngineStatus, FrameGroup, ModelCard, SessionPlan
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.memory import feature_bytes_per_pixel, require_room
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import warm_up
from lingbot_rt.errors import EngineFailed, LingbotError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Engine:
    """Owns the pipeline and the sessions' device state.

    All methods are called from one event loop. ``emit`` callbacks run on the engine thread and must not block.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._status = EngineStatus()
        self._pipeline: Pipeline | None = None
        self._features_per_pixel = 0.0
        self._sessions: dict[str, SessionState] = {}

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def card(self) -> ModelCard:
        """What the loaded model is. Raises EngineFailed before ``start`` has come that far."""
        return self._loaded.card

    @property
    def _loaded(self) -> Pipeline:
        if self._pipeline is None:
            raise EngineFailed(f"the model is not loaded yet ({self._status})")
        return self._pipeline

    async def start(self) -> None:
        """Loads and warms up; returns when ready. Raises what loading raised, with the status saying so."""
        try:
            await self._on_thread(self._load)
        except LingbotError as error:
            self._status = EngineStatus("failed", detail=str(error))
            raise

    def check(self, plan: SessionPlan) -> None:
        """Raises CapacityError when the session would not fit in what is free now. Allocates nothing."""
        require_room(self._loaded, plan, self._features_per_pixel)

    async def open(self, plan: SessionPlan) -> None:
        """Encodes prompt and picture and allocates the session's window."""

        def build() -> None:
            if not self._loaded.postprocess.loaded(plan.postprocess):
                log.info("first use of upscaling or interpolation: loading its networks")
            self._sessions[plan.session_id] = SessionState(self._loaded, plan)

        await self._on_thread(build)

    async def run(self, plan: ChunkPlan, emit: Callable[[FrameGroup], None]) -> ChunkResult:
        """Runs one chunk. Raises ChunkCancelled after ``close``, EngineFailed when the computation broke."""
        session = self._sessions.get(plan.session_id)
        if session is None:
            raise EngineFailed(f"session {plan.session_id} is not open")
        return await self._on_thread(lambda: run_chunk(self._loaded, session, plan, emit))

    async def close(self, session_id: str) -> None:
        """Interrupts the session's chunk, if one is in work, and frees what it held. Idempotent."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.cancel()
        # On the thread, in order: after the interrupted chunk, and after an `open` that is still on its way.
        await self._on_thread(lambda: self._release(session_id))

    async def stop(self) -> None:
        """Closes every session and ends the engine thread."""
        for session_id in list(self._sessions):
            await self.close(session_id)
        self._status = EngineStatus("stopped")
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    def _load(self) -> None:
        pipeline = load_pipeline(self._config, self._report)
        self._features_per_pixel = feature_bytes_per_pixel(pipeline)
        self._pipeline = pipeline
        if self._config.warmup:
            self._report(EngineStatus("warming up", 0.0))
            warm_up(
                pipeline,
                lambda done: self._report(EngineStatus("warming up", done)),
                postprocess=self._config.enable_upscaling_warmup,
            )
        self._report(EngineStatus("ready"))

    def _report(self, status: EngineStatus) -> None:
        self._status = status

    def _release(self, session_id: str) -> None:
        released = self._sessions.pop(session_id, None)
        if released is not None and self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    async def _on_thread(self, job: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, job)

    def _guarded(self, job: Callable[[], Result]) -> Result:
        """The edge of the engine thread: named errors pass, anything else is logged with its traceback and named."""
        try:
            with torch.inference_mode():
                return job()
        except LingbotError:
            raise
        except Exception as error:
            log.exception("the engine failed")
            first_line = str(error).strip().split("\n")[0]
            raise EngineFailed(f"{type(error).__name__}: {first_line}") from error
