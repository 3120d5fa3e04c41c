"""Rank 0's side: starts the workers, sends them every command, and ends the service when a rank is lost."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import CheckpointError, ChunkCancelled, ConfigError, EngineFailed, PeerLost
from lingbot_rt.parallel.groups import RankGroup, Ranks, SingleRank
from lingbot_rt.parallel.launch import (
    STOP_GRACE_S,
    RankInfo,
    open_local_store,
    require_ranks,
    start_workers,
    stop_workers,
    uses_cuda,
)
from lingbot_rt.parallel.watchdog import PERIOD_S, START_PATIENCE, Watchdog, shutdown_s
from lingbot_rt.session.plan import SessionPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Close:
    """Command: free what the session holds."""

    session_id: str


@dataclass(frozen=True, slots=True)
class AskRoom:
    """Command: share what a session takes and what is free. ``plan`` is without its picture and postprocessing."""

    plan: SessionPlan


@dataclass(frozen=True, slots=True)
class WarmUpShape:
    """Command: compile for the shape of a session that opens next."""

    plan: SessionPlan


@dataclass(frozen=True, slots=True)
class OpenFrom:
    """Command: open a session and set it to where a snapshot was taken."""

    plan: SessionPlan
    world: bytes


@dataclass(frozen=True, slots=True)
class Rewind:
    """Command: set a session back, as ``EnginePort.rewind`` does."""

    session_id: str
    chunk_index: int
    branch: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Move:
    """Command: move what a session holds to the host's memory, or back to the device."""

    session_id: str
    to_host: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Command: end the worker loop."""


class Coordinator(Protocol):
    """Rank 0's view of the ranks of a service, be it one process or several."""

    @property
    def ranks(self) -> Ranks: ...

    @property
    def compute_ms(self) -> tuple[float, ...]:
        """Milliseconds of each rank's newest chunk, without its waits for other ranks."""

    def starting(self) -> AbstractContextManager[None]:
        """Loading and warming up run inside. Every rank does both by itself."""

    def command(self, command: Any, patience_s: float = 0.0) -> AbstractContextManager[None]:
        """Rank 0's own part of ``command`` runs inside. The workers receive it first.

        A rank may go without progress for ``patience_s``, or for the usual limit if that is longer.
        """

    def stop(self) -> None:
        """Ends all workers and waits until they have exited."""


class SingleCoordinator:
    """The Coordinator of a service with one process."""

    def __init__(self) -> None:
        self.ranks: Ranks = SingleRank()

    @property
    def compute_ms(self) -> tuple[float, ...]:
        return (self.ranks.heartbeat.compute_ms,)

    def starting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def command(self, command: Any, patience_s: float = 0.0) -> AbstractContextManager[None]:
        return nullcontext()

    def stop(self) -> None: ...


class GroupCoordinator:
    """The Coordinator of a service with several processes.

    ``on_failure`` gets one line that names the lost rank and why, once, on any thread. By then the workers that this
    process started have ended, and nothing can be computed any more.
    """

    def __init__(
        self, config: ServeConfig, on_failure: Callable[[str], None], worker_command: Sequence[str], heads: int | None
    ) -> None:
        self._config = config
        self._on_failure = on_failure
        self._worker_command = worker_command
        self._heads = heads
        self._group = RankGroup(0, config.num_gpus)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watchdog: Watchdog | None = None
        self._has_joined = False
        self._exit_timer: threading.Timer | None = None

    @property
    def ranks(self) -> RankGroup:
        return self._group

    @property
    def compute_ms(self) -> tuple[float, ...]:
        return () if self._watchdog is None else tuple(each.compute_ms for each in self._watchdog.heartbeats)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Raises ConfigError when --num-gpus does not fit machine or model, EngineFailed when a rank is lost."""
        require_ranks(self._config, self._heads)
        timeout_s = self._config.rank_timeout_s
        launched = RankInfo.from_environment()
        if launched is None:
            info, store = open_local_store(self._config.num_gpus, timeout_s)
        else:
            info, store = launched, launched.connect(timeout_s)
        device = info.device("cuda" if uses_cuda(self._config) else "cpu")
        watchdog = Watchdog(info.connect(timeout_s), info.world, self._group.heartbeat, timeout_s, self._end_service)
        self._watchdog = watchdog
        if launched is None:
            self._processes = start_workers(self._worker_command, info)
        with self._watched(watchdog, START_PATIENCE):
            watchdog.start(self._processes)
            if not watchdog.wait_for_workers():
                raise PeerLost(watchdog.failure)
            info.join(self._group, store, device, START_PATIENCE * timeout_s)
            self._has_joined = True
            yield
            # Waits until every worker has loaded: the service is ready when all ranks are.
            self._group.agree(True)

    @contextmanager
    def command(self, command: Any, patience_s: float = 0.0) -> Iterator[None]:
        """Raises EngineFailed, naming the rank, when any rank broke: the ranks are then out of step for good."""
        assert self._watchdog is not None
        with self._watched(self._watchdog, max(1.0, patience_s / self._watchdog.limit_s)):
            self._group.send(command)
            yield

    def stop(self) -> None:
        if self._watchdog is None:
            return
        is_lost = bool(self._watchdog.failure)
        self._watchdog.stop()
        if self._has_joined and not is_lost:
            # Fails when a worker has gone already.
            with suppress(PeerLost):
                self._group.send(Stop())
        stop_workers(self._processes, grace_s=0 if is_lost or not self._has_joined else STOP_GRACE_S)
        if self._has_joined:
            self._group.leave()
        self._watchdog = None
        if self._exit_timer is not None:
            self._exit_timer.cancel()

    def _end_service(self, failure: str) -> None:
        # A thread that waits on a GPU for a lost rank cannot be ended, and an orderly shutdown would wait for it. The
        # timer ends the process all the same. The watchdog itself took up to two periods to notice.
        left_s = shutdown_s(self._config.rank_timeout_s) - 2 * PERIOD_S
        self._exit_timer = threading.Timer(left_s, _exit_now)
        self._exit_timer.daemon = True
        self._exit_timer.start()
        stop_workers(self._processes, grace_s=0)
        self._on_failure(failure)

    @contextmanager
    def _watched(self, watchdog: Watchdog, patience: float = 1) -> Iterator[None]:
        """Expects progress inside. All ranks agree on a cancelled chunk; any other error ends the service."""
        with watchdog.expect_progress(patience):
            try:
                yield
            except (ChunkCancelled, ConfigError, CheckpointError):
                raise
            except Exception as error:
                if not isinstance(error, PeerLost):
                    log.exception("rank 0 failed")
                raise EngineFailed(watchdog.explain(error)) from error


def _exit_now() -> None:
    log.error("the shutdown hangs: the process exits now")
    os._exit(1)


def create_coordinator(
    config: ServeConfig, on_failure: Callable[[str], None], worker_command: Sequence[str], heads: int | None = None
) -> Coordinator:
    """The coordinator of as many ranks as ``config`` asks for. Each worker is a process of ``worker_command``.

    ``heads``: attention heads of the model; read from the model's folder when None.
    """
    if config.num_gpus == 1:
        return SingleCoordinator()
    return GroupCoordinator(config, on_failure, worker_command, heads)
