"""Rank 0's side: starts the others, hands every command on, and says which rank was lost."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import CheckpointError, ChunkCancelled, ConfigError, EngineFailed, PeerLost
from lingbot_rt.parallel.groups import RankGroup, Ranks
from lingbot_rt.parallel.launch import (
    END_GRACE_S,
    Place,
    end_followers,
    open_place,
    require_ranks,
    start_followers,
    uses_cuda,
    worker_command,
)
from lingbot_rt.parallel.watch import PERIOD_S, START_PATIENCE, Watch, ending_s

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Close:
    """Command: free what the session held."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Command: end."""


class Leader:
    """One process alone: no one to lead. ``command`` and ``starting`` are where the several differ."""

    def __init__(self) -> None:
        self.ranks: Ranks = Ranks()

    @property
    def compute_ms(self) -> tuple[float, ...]:
        """Milliseconds of each rank's newest chunk, waits for the others left out: a slow rank stands out."""
        return (self.ranks.pulse.compute_ms,)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around loading and warming up, which every rank does by itself."""
        yield

    @contextmanager
    def command(self, command: Any) -> Iterator[None]:
        """Around rank 0's own share of a command that every rank follows."""
        yield

    def stop(self) -> None:
        """Ends the followers; none is left after."""


class GroupLeader(Leader):
    """Rank 0 of several. ``on_loss`` gets the verdict once, on any thread, when a rank is lost: nothing can be
    computed after that, and the followers have ended."""

    def __init__(
        self, config: ServeConfig, on_loss: Callable[[str], None], command: Sequence[str], heads: int | None
    ) -> None:
        self._config = config
        self._on_loss = on_loss
        self._command = command
        self._heads = heads
        self._group = RankGroup(0, config.num_gpus)
        self.ranks = self._group
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watch: Watch | None = None
        self._has_joined = False
        self._last_resort: threading.Timer | None = None

    @property
    def compute_ms(self) -> tuple[float, ...]:
        return () if self._watch is None else tuple(pulse.compute_ms for pulse in self._watch.pulses)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Raises ConfigError for ranks that cannot be, EngineFailed when one does not come up."""
        require_ranks(self._config, self._heads)
        timeout_s = self._config.rank_timeout_s
        launched = Place.from_environment()
        if launched is None:
            place, store = open_place(self._config.num_gpus, timeout_s)
        else:
            place, store = launched, launched.connect(timeout_s)
        device = place.device("cuda" if uses_cuda(self._config) else "cpu")
        watch = Watch(place.connect(timeout_s), place.world, self._group.pulse, timeout_s, self._lose)
        self._watch = watch
        if launched is None:
            self._processes = start_followers(self._command, place)
        with self._judged(watch, START_PATIENCE):
            watch.start(self._processes)
            if not watch.await_all():
                raise PeerLost(watch.verdict)
            place.join(self._group, store, device, START_PATIENCE * timeout_s)
            self._has_joined = True
            yield
            # Ready is said when all are.
            self._group.agree(True)

    @contextmanager
    def command(self, command: Any) -> Iterator[None]:
        """Raises EngineFailed with the verdict when a rank, this one too, broke: they are out of step for good."""
        assert self._watch is not None
        with self._judged(self._watch):
            self._group.send(command)
            yield

    def stop(self) -> None:
        if self._watch is None:
            return
        is_lost = bool(self._watch.verdict)
        self._watch.stop()
        if self._has_joined and not is_lost:
            # A follower that is gone already needs no telling.
            with suppress(PeerLost):
                self._group.send(Stop())
        end_followers(self._processes, grace_s=0 if is_lost or not self._has_joined else END_GRACE_S)
        if self._has_joined:
            self._group.leave()
        self._watch = None
        if self._last_resort is not None:
            self._last_resort.cancel()

    def _lose(self, verdict: str) -> None:
        # A thread that waits on a GPU for a rank that is gone cannot be ended; an orderly end would wait for it. What
        # the watch takes to look counts too.
        left_s = ending_s(self._config.rank_timeout_s) - 2 * PERIOD_S
        self._last_resort = threading.Timer(left_s, _end_now)
        self._last_resort.daemon = True
        self._last_resort.start()
        end_followers(self._processes, grace_s=0)
        self._on_loss(verdict)

    @contextmanager
    def _judged(self, watch: Watch, patience: int = 1) -> Iterator[None]:
        """The edge of rank 0's share: a cancelled chunk is agreed, anything else that breaks ends the service."""
        with watch.at_work(patience):
            try:
                yield
            except (ChunkCancelled, ConfigError, CheckpointError):
                raise
            except Exception as error:
                is_consequence = isinstance(error, PeerLost)
                if not is_consequence:
                    log.exception("rank 0 failed")
                raise EngineFailed(watch.explain(error, is_consequence=is_consequence)) from error


def _end_now() -> None:
    log.error("still busy, ended")
    os._exit(1)


def lead(
    config: ServeConfig,
    on_loss: Callable[[str], None],
    command: Sequence[str] | None = None,
    heads: int | None = None,
) -> Leader:
    """The leader of as many ranks as ``config`` asks for; they run ``command`` in place of a server's follower.

    ``heads``: of a model that is no folder.
    """
    if config.num_gpus == 1:
        return Leader()
    return GroupLeader(config, on_loss, command or worker_command(config), heads)
