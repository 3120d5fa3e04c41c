"""Every rank sends heartbeats; rank 0's watchdog reads them and names the rank that was lost.

Only the watchdog decides. Collectives have no time limit of their own: a dead rank, a stalled rank and a slow network
look the same to them, and each waiting rank would blame another.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from lingbot_rt.errors import PeerLost, one_line

log = logging.getLogger(__name__)

PERIOD_S = 0.2
"""Between two heartbeats of a rank, and between two checks of the watchdog."""

START_PATIENCE = 10
"""The time limit is this many times longer during start: imports, compilation and GPU set-up report no progress. A
process that fails or exits meanwhile is noticed at once."""

CAUSE_GRACE_S = 2.0
"""How long to wait for the cause: a rank may report a lost connection before another reports the error behind it."""

_SHUTDOWN_S = 6.0

_END_KEY = "end"


@dataclass(slots=True)
class Heartbeat:
    """A rank's state. Its working thread writes it; another thread sends it."""

    exchanges: int = 0  # exchanges entered; the other ranks wait for the rank with the fewest
    ticks: int = 0  # other progress: a tensor loaded, a frame decoded
    compute_ms: float = 0.0  # the newest chunk without the waits for other ranks
    error: str = ""  # kind and first line of the error that ended this rank's work
    is_peer_lost: bool = False  # the error only says that another rank went away
    beats: int = 0  # heartbeats sent; 0 before the rank has started

    @property
    def progress(self) -> tuple[int, int]:
        return self.exchanges, self.ticks

    @classmethod
    def parse(cls, text: bytes) -> Heartbeat:
        """From JSON; from nothing before the rank's first heartbeat."""
        return cls(**json.loads(text)) if text else cls()


class HeartbeatSender:
    """A worker's two background threads.

    One sends heartbeats and calls ``on_end`` when the service has ended or the store is gone. The other calls it when
    the store has not answered for ``limit_s``, as with a cut link. The working thread may wait in a collective for
    ever, so ``on_end`` has to end the process.
    """

    def __init__(
        self, store: dist.Store, rank: int, heartbeat: Heartbeat, limit_s: float, on_end: Callable[[], None]
    ) -> None:
        self._store = store
        self._key = _key(rank)
        self._heartbeat = heartbeat
        self._on_end = on_end
        self._limit_s = limit_s
        self._answered_at = time.monotonic()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._await_answers)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def send(self) -> None:
        """Returns once rank 0's store has the heartbeat. Raises RuntimeError when the store is gone."""
        with self._lock:
            self._heartbeat.beats += 1
            self._store.set(self._key, json.dumps(asdict(self._heartbeat)))

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            try:
                self.send()
                ended = self._store.check([_END_KEY])
                self._answered_at = time.monotonic()
            except RuntimeError:
                ended = True
            if ended:
                if not self._stopping.is_set():
                    self._on_end()
                return

    def _await_answers(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            if time.monotonic() - self._answered_at > self._limit_s:
                log.error("rank 0 has not answered for %.0f s: this rank ends", self._limit_s)
                self._on_end()
                return


class Watchdog:
    """Rank 0's thread that reads every heartbeat. ``on_failure`` gets one line that names the lost rank and why, once.

    ``own`` is rank 0's own heartbeat, which does not go through the store.
    """

    def __init__(
        self,
        store: dist.Store,
        world: int,
        own: Heartbeat,
        timeout_s: float,
        on_failure: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._world = world
        self._clock = clock
        self._own = own
        self.limit_s = timeout_s - shutdown_s(timeout_s)  # longest silence, and longest stall during work
        self._on_failure = on_failure
        self._processes: Mapping[int, subprocess.Popen[bytes]] = {}
        self._is_busy = False
        self._patience = 1.0
        self._progress: list[tuple[int, int]] = []
        self._moved_at = self._clock()
        self._peer_lost_at: float | None = None
        self._failure = ""
        self._failing = threading.Lock()
        self._failed = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.heartbeats = [Heartbeat() for _ in range(world)]
        self._heard_at = [self._clock()] * world
        for rank in range(1, world):
            store.set(_key(rank), "")

    @property
    def failure(self) -> str:
        """Which rank was lost and why; empty while all are well."""
        return self._failure

    def start(self, processes: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """``processes``: the workers that this process started itself, by rank."""
        self._processes = processes
        self._heard_at = [self._clock()] * self._world
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @contextmanager
    def expect_progress(self, patience: float = 1) -> Iterator[None]:
        """Inside, the ranks must make progress within ``patience`` times the limit. Outside they may stand still."""
        self._moved_at = self._clock()
        self._patience = patience
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def wait_for_workers(self) -> bool:
        """Waits until every worker has sent a heartbeat. False when a rank is lost first."""
        while not all(heartbeat.beats for heartbeat in self.heartbeats[1:]):
            if self._failed.wait(PERIOD_S / 4):
                return False
        return True

    def explain(self, error: Exception) -> str:
        """Why the work on rank 0 broke with ``error``. After a PeerLost it waits for the rank that caused it."""
        is_peer_lost = isinstance(error, PeerLost)
        if is_peer_lost:
            self._failed.wait(CAUSE_GRACE_S + 5 * PERIOD_S)
        if not self._failure:
            text = one_line(error)
            self._fail(self._lost_connection(0, text) if is_peer_lost else f"rank 0 failed: {text}")
        return self._failure

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S) and not self.check():
            pass

    def check(self) -> str:
        """Reads all heartbeats and looks for a lost rank. Returns the failure, or nothing."""
        # Processes before heartbeats: a rank reports its error before it exits, so the report is then there to read.
        exited = {rank: code for rank, process in self._processes.items() if (code := process.poll()) is not None}
        try:
            self._read_heartbeats()
        except RuntimeError as error:
            # Under torchrun the store belongs to its agent, which may end before this process does.
            failure = f"the ranks' store is gone: {one_line(error)}"
        else:
            failure = self._find_error() or self._find_exited(exited) or self._find_silent() or self._find_stalled()
        if failure and not self._stopping.is_set():
            self._fail(failure)
        return self._failure

    def _fail(self, failure: str) -> None:
        with self._failing:
            if self._failure:
                return
            log.error("%s: the service ends", failure)
            with suppress(RuntimeError):
                self._store.set(_END_KEY, failure)
            self._on_failure(failure)
            # Last: whoever sees the failure may rely on `on_failure` being done.
            self._failure = failure
            self._failed.set()

    def _read_heartbeats(self) -> None:
        now = self._clock()
        texts = self._store.multi_get([_key(rank) for rank in range(1, self._world)])
        # A copy: rank 0's own heartbeat changes while it is checked.
        heartbeats = [replace(self._own), *(Heartbeat.parse(text) for text in texts)]
        for rank, (old, new) in enumerate(zip(self.heartbeats, heartbeats, strict=True)):
            if new != old:
                self._heard_at[rank] = now
        self.heartbeats = heartbeats
        progress = [heartbeat.progress for heartbeat in heartbeats]
        if progress != self._progress:
            self._progress = progress
            self._moved_at = now

    def _find_error(self) -> str:
        broken = [(rank, heartbeat) for rank, heartbeat in enumerate(self.heartbeats) if heartbeat.error]
        for rank, heartbeat in broken:
            if not heartbeat.is_peer_lost:
                return f"rank {rank} failed: {heartbeat.error}"
        if not broken:
            return ""
        if self._peer_lost_at is None:
            self._peer_lost_at = self._clock()
        if self._clock() - self._peer_lost_at < CAUSE_GRACE_S:
            return ""
        rank, heartbeat = broken[0]
        return self._lost_connection(rank, heartbeat.error)

    def _lost_connection(self, rank: int, error: str) -> str:
        """The failure when ``rank`` lost a connection and no rank has reported the cause.

        A process on another host is not seen to exit, but its heartbeats stop.
        """
        now = self._clock()
        for other in range(1, self._world):
            if not self.heartbeats[other].error and now - self._heard_at[other] > CAUSE_GRACE_S / 2:
                return f"rank {other} is gone"
        return f"rank {rank} lost its connection to the others: {error}"

    def _find_exited(self, exited: Mapping[int, int]) -> str:
        for rank, code in exited.items():
            if self.heartbeats[rank].is_peer_lost:
                continue
            if code < 0:
                return f"rank {rank} was killed by {signal.Signals(-code).name}"
            return f"rank {rank} ended by itself with exit code {code}"
        return ""

    def _find_silent(self) -> str:
        now = self._clock()
        for rank in range(1, self._world):
            silence_s = now - self._heard_at[rank]
            has_started = self.heartbeats[rank].beats > 0
            if not has_started and silence_s > self._patience * self.limit_s:
                return f"rank {rank} did not start within {silence_s:.0f} s"
            if has_started and silence_s > self.limit_s:
                return f"rank {rank} gave no sign of life for {silence_s:.0f} s"
        return ""

    def _find_stalled(self) -> str:
        stalled_s = self._clock() - self._moved_at
        if not self._is_busy or stalled_s <= self._patience * self.limit_s:
            return ""
        entered = [heartbeat.exchanges for heartbeat in self.heartbeats]
        if min(entered) == max(entered):
            return f"all ranks wait in exchange {entered[0]} for {stalled_s:.0f} s: the link between them is broken"
        rank = entered.index(min(entered))
        return (
            f"rank {rank} stalled: for {stalled_s:.0f} s it has not come to exchange {max(entered)}, "
            f"where the others wait"
        )


def shutdown_s(timeout_s: float) -> float:
    """The part of ``timeout_s`` that is kept to tell the client and end the processes once a rank is lost."""
    return min(_SHUTDOWN_S, timeout_s / 2)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
