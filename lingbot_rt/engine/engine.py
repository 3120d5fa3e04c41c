"""The async face of the engine: one thread owns the device, everything that touches it runs there in order."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_run import Emit, ThreadedChunkRun
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.compilation import compilations
from lingbot_rt.engine.device_memory import allocated_bytes, memory_parts
from lingbot_rt.engine.going_back import set_back
from lingbot_rt.engine.memory import MemoryPlan, describe_share, fits, release_unused, require_host_room, require_room
from lingbot_rt.engine.model_memory import require_memory
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.profiler import ChunkProfiler
from lingbot_rt.engine.progress import POLL_S, ThreadProgress
from lingbot_rt.engine.residency import Residency
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import LimitedWarmUp, warm_up
from lingbot_rt.engine.worker import worker_command
from lingbot_rt.engine.world import go_on_from, read_snapshot, to_bytes, world_parts
from lingbot_rt.errors import CapacityError, ChunkCancelled, EngineFailed, LingbotError, UnsoundFrames, one_line
from lingbot_rt.models.dit import COMPILED_SHAPES
from lingbot_rt.parallel.coordinator import Close, Move, OpenFrom, Rewind, WarmUpShape, create_coordinator
from lingbot_rt.session.plan import ChunkPlan, ChunkResult, EngineStatus, ModelInfo, Rewound, SessionPlan, WarmUp
from lingbot_rt.shapes import FrameSize

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_LOST_GRACE_S = 1.0

_LESS_MEMORY = (
    "use a smaller size, num_frames or realtime_causal_kv_cache_num_frames, or do without upscaling and interpolation"
)


class Shape(NamedTuple):
    """What code is compiled for."""

    size: FrameSize
    latent_frames: int
    half_vae: bool = False  # the second VAE

    def __str__(self) -> str:
        vae = ", the VAE in bfloat16" if self.half_vae else ""
        return f"{self.size} with {self.latent_frames} latent frames per chunk{vae}"


class Engine:
    """Owns the pipeline and the sessions' device state. All methods are called from one event loop."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._status = EngineStatus()
        self._pipeline: Pipeline | None = None
        self._model_bytes = 0  # on the device, before any session
        self._sessions: dict[str, SessionState] = {}
        self._residency = Residency(self._move)
        # What compiled code is there for. The engine thread replaces it as a whole.
        self._compiled: tuple[Shape, ...] = ()
        self._warm_up: LimitedWarmUp | None = None  # of the session that opens
        self._warm_up_took_s: float | None = None  # the newest one
        self._coordinator = create_coordinator(config, self._lose, worker_command(config))
        self._loss: asyncio.Future[str] | None = None  # why the engine is lost; None before ``start``
        self._progress = ThreadProgress(self._marks)
        self._profiler = ChunkProfiler()
        self._watch: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def is_lost(self) -> bool:
        """Whether the thread hangs, the device failed for good, or one of several ranks is gone.

        Nothing can be computed any more, and the process has to end.
        """
        return self._loss is not None and self._loss.done()

    @property
    def model_info(self) -> ModelInfo:
        """What the loaded model is. Raises EngineFailed before ``start`` has come that far."""
        return self._loaded.model_info

    @property
    def _loaded(self) -> Pipeline:
        if self._pipeline is None:
            raise EngineFailed(f"the model is not loaded yet ({self._status})")
        return self._pipeline

    async def start(self) -> None:
        """Loads and warms up; returns when ready. Raises what loading raised; ``status`` then says so too."""
        self._loss = asyncio.get_running_loop().create_future()
        try:
            await self._on_thread(self._load)
        except LingbotError as error:
            self._status = EngineStatus("failed", detail=str(error))
            raise
        if self._config.num_gpus == 1:
            # With several ranks the coordinator watches all of them, this one too.
            self._watch = asyncio.create_task(self._watch_thread(), name="engine watch")

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of rank 0's device by what holds them; empty on a CPU and before the model is loaded."""
        return {} if self._pipeline is None else memory_parts(self._pipeline.device, self._model_bytes)

    @property
    def warm_sizes(self) -> tuple[FrameSize, ...] | None:
        """Sizes at which a session opens without a warm-up, with the model's latent frames; None: all of them."""
        if self._pipeline is None or not self.model_info.compiled:
            return None
        own = self.model_info.latent_frames
        return tuple(shape.size for shape in self._compiled if (shape.latent_frames, shape.half_vae) == (own, False))

    def warm_up_of(self, plan: SessionPlan) -> WarmUp | None:
        """The warm-up that ``open`` begins with: of the first session of a shape, while any more may be compiled."""
        if (
            not self.model_info.compiled
            or self._shape_of(plan) in self._compiled
            or len(self._compiled) >= COMPILED_SHAPES
        ):
            return None
        return WarmUp(plan.size, plan.latent_frames, self._warm_up_took_s)

    async def open(self, plan: SessionPlan, world: bytes | None = None) -> Rewound | None:
        """Compiles for the session's shape if need be, encodes prompt and picture, allocates the session's window.

        ``world``: a snapshot that the session goes on from. Sessions that do not compute make room if need be.

        Raises CapacityError, with nothing allocated, if the session does not fit in the memory that is free now, or if
        compiling took longer than --session-warmup-limit-s. Raises InvalidInit if an upscaling or interpolation model
        does not load or the snapshot does not fit, ChunkCancelled if ``close`` came before it was open.
        """
        if self.warm_up_of(plan) is not None:
            warm_up = self._warm_up = LimitedWarmUp(plan.session_id)
            try:
                await self._on_thread(lambda: self._compile_for(plan, warm_up))
            finally:
                warm_up.stop()  # the client may be gone
                self._warm_up = None

        def build() -> Rewound | None:
            if not self._loaded.postprocess.loaded(plan.postprocess):
                log.info("first use of upscaling or interpolation: loading its networks")
            # Checked before the other ranks are told: what does not load or fit concerns this client only.
            snapshot = None if world is None else read_snapshot(self._loaded, plan, world)
            require_room(self._loaded, plan, self._coordinator, partial(self._make_room, plan))
            with self._coordinator.command(plan if world is None else OpenFrom(plan, world)):
                session = self._sessions[plan.session_id] = SessionState(self._loaded, plan)
                self._residency.opened(plan.session_id)
                return None if snapshot is None else go_on_from(self._loaded, session, snapshot)

        return await self._on_thread(build)

    def run(self, plan: ChunkPlan) -> ThreadedChunkRun:
        """Starts one chunk: iterate what this returns for its frames.

        The iteration raises ChunkCancelled after ``close`` and EngineFailed when the computation broke.
        """
        return ThreadedChunkRun(lambda emit: self._on_thread(lambda: self._run_chunk(plan, emit)))

    async def rewind(self, session_id: str, chunk_index: int, branch: int, keep: bool) -> Rewound:
        """As ``EnginePort`` says. Raises ChunkCancelled if ``close`` came before it was done."""

        def rewind() -> Rewound:
            session = self._used(session_id)
            window = session.history.go_back(branch, chunk_index, keep=keep)
            with self._coordinator.command(Rewind(session_id, chunk_index, branch, keep)):
                is_exact = set_back(self._loaded, session, window, chunk_index)
            return Rewound(chunk_index, session.history.branch, is_exact, session.history.kept_from())

        return await self._on_thread(rewind)

    async def snapshot(self, session_id: str, about: str) -> bytes:
        """As ``EnginePort`` says. The engine goes on while the file is put together."""
        parts = await self._on_thread(lambda: world_parts(self._loaded, self._session(session_id), about))
        return await asyncio.to_thread(to_bytes, parts)

    async def park(self, session_id: str) -> int:
        def park() -> int:
            session = self._session(session_id)
            self._residency.parked(session_id)
            return session.nbytes

        return await self._on_thread(park)

    async def profile(self, chunks: int, file: Path, limit_s: float) -> int:
        """Writes a trace of the next chunks of rank 0 to ``file``; how many came within ``limit_s``."""
        return await self._profiler.record(chunks, file, limit_s, self._loaded.device, self._on_thread)

    async def close(self, session_id: str) -> None:
        """Interrupts the session's chunk, if one is running, and frees the session's memory. Idempotent."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.cancel()
        if self._warm_up is not None and self._warm_up.session_id == session_id:
            self._warm_up.stop()
        # The thread works in order: this comes after the interrupted chunk and after an `open` that has not run yet.
        try:
            await self._on_thread(lambda: self._release(session_id))
        except EngineFailed:
            # If the engine is lost, the process ends and its memory is freed with it.
            if not self.is_lost:
                raise

    async def stop(self) -> None:
        """Closes every session and ends the engine thread."""
        if self._watch is not None:
            self._watch.cancel()
        for session_id in list(self._sessions):
            await self.close(session_id)
        self._status = EngineStatus("stopped")
        stopping = asyncio.get_running_loop().run_in_executor(self._thread, self._coordinator.stop)
        if self.is_lost:
            # The thread may hang for ever. The process must not.
            await asyncio.wait({stopping}, timeout=_LOST_GRACE_S)
        else:
            await stopping
        await asyncio.to_thread(self._thread.shutdown, wait=not self.is_lost, cancel_futures=True)

    def _run_chunk(self, plan: ChunkPlan, emit: Emit) -> ChunkResult:
        session = self._used(plan.session_id)
        with self._profiler.chunk(), self._coordinator.command(plan):
            try:
                result: ChunkResult | UnsoundFrames = run_chunk(self._loaded, session, plan, emit)
            except UnsoundFrames as error:
                result = error
        if isinstance(result, UnsoundFrames):
            # Raised behind the command: the chunk ran to its end on every rank, so the service goes on.
            raise result
        timings = replace(result.timings, ranks_ms=self._coordinator.compute_ms)
        return replace(result, timings=timings)

    def _session(self, session_id: str) -> SessionState:
        session = self._sessions.get(session_id)
        if session is None:
            raise EngineFailed(f"session {session_id} is not open")
        return session

    def _used(self, session_id: str) -> SessionState:
        """The session, on the device."""
        session = self._session(session_id)
        self._residency.use(session_id, lambda: fits(self._loaded, session.plan, self._coordinator))
        return session

    def _make_room(self, plan: SessionPlan, needed: MemoryPlan, has_room: Callable[[], bool]) -> None:
        """Moves sessions off the device until it ``has_room``. Raises CapacityError if the host has none for all."""
        if not self._sessions or has_room():
            return
        missing = sum(session.missing_host_bytes for session in self._sessions.values())
        require_host_room(plan, needed, missing, self._loaded.ranks.world)
        self._residency.make_room(has_room)

    def _move(self, session_id: str, to_host: bool) -> None:
        begun = time.monotonic()
        with self._coordinator.command(Move(session_id, to_host)):
            self._sessions[session_id].move(torch.device("cpu") if to_host else self._loaded.device)
            if to_host:
                release_unused(self._loaded.device)
        where = "off" if to_host else "back to"
        log.info("session %s moved %s the device in %.1f s", session_id, where, time.monotonic() - begun)

    def _load(self) -> None:
        if self._config.num_gpus > 1:
            # Before the ranks start: on a CPU they take from one memory.
            require_memory(self._config)
        with self._coordinator.starting():
            pipeline = load_pipeline(self._config, self._report, self._coordinator.ranks)
            if pipeline.ranks.world > 1:
                log.info("%s", describe_share(pipeline))
            self._pipeline = pipeline
            if self._config.warmup:
                self._report(EngineStatus("warming up", 0.0))
                if warm_up(
                    pipeline,
                    lambda done: self._report(EngineStatus("warming up", done)),
                    postprocess=self._config.enable_upscaling_warmup,
                ):
                    self._compiled = (Shape(pipeline.model_info.default_size, pipeline.model_info.latent_frames),)
        self._model_bytes = allocated_bytes(pipeline.device)
        self._report(EngineStatus("ready"))

    def _compile_for(self, plan: SessionPlan, warm_up: LimitedWarmUp) -> None:
        shape = self._shape_of(plan)
        if shape in self._compiled:  # by the session before, while this one waited for the thread
            return
        # What does not fit is not compiled for either.
        require_room(self._loaded, plan, self._coordinator)
        limit_s = self._config.session_warmup_limit_s
        log.info("first session of %s: compiling", shape)
        begun = time.monotonic()
        try:
            with self._coordinator.command(WarmUpShape(plan), limit_s):
                warm_up.run(self._loaded, plan, limit_s)
        except ChunkCancelled:
            if not warm_up.is_late:
                raise
            ready = ", ".join(map(str, self.warm_sizes or ()))
            raise CapacityError(
                f"compiling for {shape} took longer than {limit_s:g} s (--session-warmup-limit-s): try again, compiled "
                "parts are kept" + (f", or use {ready}" if ready else ""),
                field="size",
            ) from None
        self._warm_up_took_s = time.monotonic() - begun
        self._compiled += (shape,)
        log.info("compiled for %s in %.0f s", shape, self._warm_up_took_s)

    def _shape_of(self, plan: SessionPlan) -> Shape:
        return Shape(plan.size, plan.latent_frames, self._loaded.half_vae_of(plan) is not None)

    def _report(self, status: EngineStatus) -> None:
        self._coordinator.ranks.tick()
        self._status = status

    def _release(self, session_id: str) -> None:
        if session_id not in self._sessions:
            return
        with self._coordinator.command(Close(session_id)):
            self._sessions.pop(session_id).release()
            self._residency.closed(session_id)
            release_unused(self._loaded.device)

    def _lose(self, failure: str) -> None:
        """Nothing can be computed any more. Called on any thread, also more than once."""
        assert self._loss is not None
        self._status = EngineStatus("failed", detail=failure)
        self._loss.get_loop().call_soon_threadsafe(self._set_loss, failure)

    def _set_loss(self, failure: str) -> None:
        assert self._loss is not None
        if not self._loss.done():
            self._loss.set_result(failure)

    async def _watch_thread(self) -> None:
        """Loses the engine when its thread makes no progress for --chunk-timeout-s."""
        limit_s = self._config.chunk_timeout_s
        while self._progress.stalled_s() < limit_s:  # noqa: ASYNC110
            await asyncio.sleep(min(POLL_S, limit_s / 4))
        log.critical("the engine thread hangs here:\n%s", self._progress.stack())
        self._lose(f"the engine hangs: no progress for {limit_s:g} s (--chunk-timeout-s)")

    def _marks(self) -> tuple[object, ...]:
        """Changes whenever the thread gets on: with each forward and decode, and while it compiles."""
        pipeline = self._loaded
        # On a GPU the thread may use CPU time while it waits for the device.
        cpu_s = self._progress.cpu_s() if pipeline.device.type == "cpu" else 0.0
        limit_s = self._config.session_warmup_limit_s
        compiling = compilations(limit_s) if pipeline.model_info.compiled else None
        return pipeline.ranks.heartbeat.progress, cpu_s, compiling

    async def _on_thread(self, job: Callable[[], Result]) -> Result:
        """``job``'s result. Raises EngineFailed as soon as the engine is lost: the thread may be stuck for good."""
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, job)
        if self._loss is None:
            return await work
        waited: set[asyncio.Future[Any]] = {work, self._loss}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            work.cancel()
            raise
        if self._loss.done():
            work.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise EngineFailed(self._loss.result())
        return work.result()

    def _guarded(self, job: Callable[[], Result]) -> Result:
        """The edge of the engine thread: named errors pass, anything else is logged with its traceback and named."""
        try:
            with self._progress.job(), torch.inference_mode():
                return job()
        except LingbotError as error:
            _drop_locals(error)
            raise
        except Exception as error:
            log.exception("the engine failed")
            _drop_locals(error)
            if self._pipeline is not None and not device_works(self._pipeline.device):
                self._lose(f"the device failed for good: {one_line(error)}")
            raise _named(error) from error


def device_works(device: torch.device) -> bool:
    """False after an error that stays, such as an illegal memory access: every later call to the device fails too."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _named(error: Exception) -> EngineFailed:
    # torch's allocator for CPUs raises a RuntimeError that only its text tells from others.
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return EngineFailed(f"out of memory, {_LESS_MEMORY} ({one_line(error)})" if is_memory else one_line(error))


def _drop_locals(error: BaseException) -> None:
    """Frees what the frames of a traceback hold: gigabytes of a chunk's tensors, for as long as the error is kept."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
