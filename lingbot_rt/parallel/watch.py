"""Who is alive and who moves: every rank tells its pulse, rank 0 watches and names the one that was lost.

The watch is the only judge. Collectives have no time limit of their own: a dead peer, a stalled one and a slow network
look alike to them, and the ranks that wait would each blame another.
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

log = logging.getLogger(__name__)

PERIOD_S = 0.2

_ENDING_S = 6.0

START_PATIENCE = 10
"""Times the limit that a start may stand still: imports, compilation and first contact with a GPU tell no progress. A
process that fails or ends meanwhile is noticed at once all the same."""

CAUSE_GRACE_S = 2.0
"""A rank whose peer vanished may be heard before the cause is known: that long the cause is waited for."""

_END = "end"


@dataclass(slots=True)
class Pulse:
    """Where a rank is. Written by the thread that works, read by the one that tells."""

    exchanges: int = 0  # collectives entered: the rank with the fewest is the one that the others wait for
    ticks: int = 0  # any other progress: a tensor loaded, a frame decoded
    compute_ms: float = 0.0  # the newest chunk, waits for other ranks left out
    failure: str = ""
    is_consequence: bool = False  # the failure is that another rank went away
    beats: int = 0  # goes up while the process runs at all

    @property
    def progress(self) -> tuple[int, int]:
        return self.exchanges, self.ticks

    @classmethod
    def parse(cls, text: bytes) -> Pulse:
        """Empty before the rank has come up."""
        return cls(**json.loads(text)) if text else cls()


class PulseSender:
    """A follower's threads: one tells the pulse, and calls ``on_end`` when the service has ended or rank 0 is gone; the
    other does when rank 0's store has not answered for ``limit_s``, which is how a broken link looks.

    The working thread may then wait in a collective for ever: only the process can end.
    """

    def __init__(self, store: dist.Store, rank: int, pulse: Pulse, limit_s: float, on_end: Callable[[], None]) -> None:
        self._store = store
        self._key = _key(rank)
        self._pulse = pulse
        self._on_end = on_end
        self._limit_s = limit_s
        self._answered_at = time.monotonic()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._guard)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def tell(self) -> None:
        """Returns once rank 0's store has it. Raises RuntimeError when the store is gone."""
        with self._lock:
            self._pulse.beats += 1
            self._store.set(self._key, json.dumps(asdict(self._pulse)))

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            try:
                self.tell()
                ended = self._store.check([_END])
                self._answered_at = time.monotonic()
            except RuntimeError:
                ended = True
            if ended:
                if not self._stopping.is_set():
                    self._on_end()
                return

    def _guard(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            if time.monotonic() - self._answered_at > self._limit_s:
                log.error("rank 0 has not answered for %.0f s: this rank ends", self._limit_s)
                self._on_end()
                return


class Watch:
    """Rank 0's thread: reads every pulse, and tells ``on_loss`` once which rank was lost and why."""

    def __init__(
        self,
        store: dist.Store,
        world: int,
        own: Pulse,
        timeout_s: float,
        on_loss: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._world = world
        self._clock = clock
        self._own = own
        self.limit_s = timeout_s - ending_s(timeout_s)  # of silence, or of standing still while there is work
        self._on_loss = on_loss
        self._processes: Mapping[int, subprocess.Popen[bytes]] = {}
        self._is_busy = False
        self._patience = 1
        self._progress: list[tuple[int, int]] = []
        self._moved_at = self._clock()
        self._orphaned_at: float | None = None
        self._verdict = ""
        self._declaring = threading.Lock()
        self._declared = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.pulses = [Pulse() for _ in range(world)]
        self._heard_at = [self._clock()] * world
        for rank in range(1, world):
            store.set(_key(rank), "")

    @property
    def verdict(self) -> str:
        """Which rank was lost and why; empty while all are well."""
        return self._verdict

    def start(self, processes: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """``processes``: the followers that this process started itself, by rank."""
        self._processes = processes
        self._heard_at = [self._clock()] * self._world
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @contextmanager
    def at_work(self, patience: int = 1) -> Iterator[None]:
        """Progress is expected inside, within ``patience`` times the limit; between commands a rank may rest."""
        self._moved_at = self._clock()
        self._patience = patience
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def await_all(self) -> bool:
        """Waits until every follower has come up: True. False when one is lost first."""
        while not all(pulse.beats for pulse in self.pulses[1:]):
            if self._declared.wait(PERIOD_S / 4):
                return False
        return True

    def explain(self, error: Exception, *, is_consequence: bool) -> str:
        """Why the work on rank 0 broke: the verdict on another rank when ``error`` only followed from that."""
        if is_consequence:
            self._declared.wait(CAUSE_GRACE_S + 5 * PERIOD_S)
        if not self._verdict:
            self._declare(
                self._gone_from(0, first_line(error)) if is_consequence else f"rank 0 failed: {first_line(error)}"
            )
        return self._verdict

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S) and not self.look():
            pass

    def look(self) -> str:
        """Judges what is seen now; the verdict, or nothing."""
        # Processes before pulses: one that says why and then ends has said so before it is seen to have ended.
        ended = {rank: code for rank, process in self._processes.items() if (code := process.poll()) is not None}
        try:
            self._read_pulses()
        except RuntimeError as error:
            # Under torchrun the store is its agent's, which may go before this process does.
            verdict = f"the ranks' store is gone: {first_line(error)}"
        else:
            verdict = self._failed() or self._ended(ended) or self._silent() or self._stalled()
        if verdict and not self._stopping.is_set():
            self._declare(verdict)
        return self._verdict

    def _declare(self, verdict: str) -> None:
        with self._declaring:
            if self._verdict:
                return
            log.error("%s: the service ends", verdict)
            with suppress(RuntimeError):
                self._store.set(_END, verdict)
            self._on_loss(verdict)
            # Last: whoever sees it finds everything that follows from it done.
            self._verdict = verdict
            self._declared.set()

    def _read_pulses(self) -> None:
        now = self._clock()
        texts = self._store.multi_get([_key(rank) for rank in range(1, self._world)])
        # A copy: its own pulse goes on changing while it is judged.
        pulses = [replace(self._own), *(Pulse.parse(text) for text in texts)]
        for rank, (old, new) in enumerate(zip(self.pulses, pulses, strict=True)):
            if new != old:
                self._heard_at[rank] = now
        self.pulses = pulses
        progress = [pulse.progress for pulse in pulses]
        if progress != self._progress:
            self._progress = progress
            self._moved_at = now

    def _failed(self) -> str:
        failures = [(rank, pulse) for rank, pulse in enumerate(self.pulses) if pulse.failure]
        for rank, pulse in failures:
            if not pulse.is_consequence:
                return f"rank {rank} failed: {pulse.failure}"
        if not failures:
            return ""
        if self._orphaned_at is None:
            self._orphaned_at = self._clock()
        if self._clock() - self._orphaned_at < CAUSE_GRACE_S:
            return ""
        rank, pulse = failures[0]
        return self._gone_from(rank, pulse.failure)

    def _gone_from(self, rank: int, failure: str) -> str:
        """What to say when ``rank`` lost a connection and nobody has said why: on other hosts processes are not seen
        to end, but their pulse stops."""
        now = self._clock()
        for other in range(1, self._world):
            if not self.pulses[other].failure and now - self._heard_at[other] > CAUSE_GRACE_S / 2:
                return f"rank {other} is gone"
        return f"rank {rank} lost its connection to the others: {failure}"

    def _ended(self, ended: Mapping[int, int]) -> str:
        for rank, code in ended.items():
            if self.pulses[rank].is_consequence:
                continue
            if code < 0:
                return f"rank {rank} was killed by {signal.Signals(-code).name}"
            return f"rank {rank} ended by itself with exit code {code}"
        return ""

    def _silent(self) -> str:
        now = self._clock()
        for rank in range(1, self._world):
            silence_s = now - self._heard_at[rank]
            has_started = self.pulses[rank].beats > 0
            if not has_started and silence_s > self._patience * self.limit_s:
                return f"rank {rank} did not start within {silence_s:.0f} s"
            if has_started and silence_s > self.limit_s:
                return f"rank {rank} gave no sign of life for {silence_s:.0f} s"
        return ""

    def _stalled(self) -> str:
        stalled_s = self._clock() - self._moved_at
        if not self._is_busy or stalled_s <= self._patience * self.limit_s:
            return ""
        entered = [pulse.exchanges for pulse in self.pulses]
        if min(entered) == max(entered):
            return f"all ranks wait in exchange {entered[0]} for {stalled_s:.0f} s: the link between them is broken"
        rank = entered.index(min(entered))
        return (
            f"rank {rank} stalled: for {stalled_s:.0f} s it has not come to exchange {max(entered)}, "
            f"where the others wait"
        )


def ending_s(timeout_s: float) -> float:
    """What of the time limit is kept for telling and ending, after a silent or stalled rank is lost."""
    return min(_ENDING_S, timeout_s / 2)


def first_line(error: BaseException) -> str:
    """``RuntimeError: the kernel said no`` of a longer message."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _key(rank: int) -> str:
    return f"pulse/{rank}"
