"""Lets many random clients at a server for minutes or hours, and fails if anything of theirs stays behind.

    .venv/bin/python scripts/soak.py --minutes 60
    .venv/bin/python scripts/soak.py --minutes 10 -- --device cuda --load-format dummy

Starts a server of its own; what follows ``--`` are further options of ``lingbot-rt serve``. Clients walk, change
prompts, break off, come back to their session, go back in it, read slowly, send nonsense, ask the HTTP endpoints, or
only connect. ``--only come_back`` lets all of them do one of these. Whatever they do, these must hold at the end:

- no error or close but those that the clients provoke
- resident memory grows by less than --memory-slope MB an hour after the first quarter
- open files, threads, tasks and session states are back where they were before the first client
- the 99th percentile of the event latency in the last quarter is less than twice that of the first. It is counted in
  chunk times, because other work on the machine slows down both, and only where the client reads at once and keeps its
  line: chunks that waited for a client leave all at once, long after their events.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from lingbot_rt.client.address import ServerAddress
from lingbot_rt.client.protocol import init_message

START_LIMIT_S = 300
IDLE_LIMIT_S = 60  # for the server to come to rest after the last client
SAMPLE_EVERY_S = 5.0
TOLERANCE = 2  # more files, threads, tasks or states than before that count as none
PROVOKED = {"invalid_init", "invalid_event", "session_busy", "capacity", "pause_expired", "message_too_large"}
"""Codes of errors that the clients below ask for."""

PROVOKED_CLOSES = {1000, 1006, 1008, 1009, None}
SIZES = ("64x64", "96x64", "128x96", "160x96")
FORMATS = ("webp", "jpeg", "raw", "delta-gzip")
KEYS = ("", "w", "a", "s", "d", "i", "j", "k", "l", "wd", "wl", "sj")
WORDS = ("a village", "at night", "in the snow", "at sunset", "雪", "é" * 40, "x" * 2000)

# Runs inside the server's process: counts what only Python knows, each time the file REQUEST appears.
PROBE = """
import gc, json, os, sys, threading, time
def watch(folder):
    import asyncio
    request, answer = os.path.join(folder, "request"), os.path.join(folder, "answer")
    while True:
        time.sleep(0.2)
        if not os.path.exists(request):
            continue
        gc.collect()  # what only waits for a collection is not left behind
        kinds = [type(each).__name__ for each in gc.get_objects() if type(each).__name__ in ("SessionState", "Task")]
        with open(answer + ".new", "w") as file:
            json.dump({kind: kinds.count(kind) for kind in ("SessionState", "Task")}, file)
        os.remove(request)
        os.rename(answer + ".new", answer)
threading.Thread(target=watch, args=(sys.argv.pop(1),), daemon=True).start()
from lingbot_rt.cli import main
raise SystemExit(main())
"""


@dataclass
class Findings:
    """What the clients saw and what was measured."""

    did: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    closes: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, chunk times
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, MB
    frames: int = 0
    resumed: int = 0  # sessions that went on after their line was lost
    rewound: int = 0


class Server:
    """A server process with the probe in it."""

    def __init__(self, options: list[str], folder: Path) -> None:
        self._folder = folder
        self.log = (folder / "server.log").open("w+", encoding="utf-8")
        words = [sys.executable, "-c", PROBE, str(folder), "serve", "--port", "0", "--log-level", "warning", *options]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.url = self._read_url()

    def _read_url(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            for word in line.split():
                if word.startswith("http://"):
                    return word.rstrip("/")
        raise SystemExit(f"the server did not start:\n{self.tail()}")

    def tail(self) -> str:
        self.log.flush()
        return (self._folder / "server.log").read_text(encoding="utf-8")[-3000:]

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def wait_ready(self) -> None:
        end = time.monotonic() + START_LIMIT_S
        while self.get("/health")[0] != 200:
            if time.monotonic() > end or self._process.poll() is not None:
                raise SystemExit(f"the server did not get ready:\n{self.tail()}")
            time.sleep(0.5)

    def memory_mb(self) -> float:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise SystemExit(f"the server ended:\n{self.tail()}")

    def counts(self) -> dict[str, int]:
        """Open files and threads of the process, and its Task and SessionState objects."""
        answer = self._folder / "answer"
        answer.unlink(missing_ok=True)
        (self._folder / "request").touch()
        end = time.monotonic() + 60
        while not answer.exists():
            if time.monotonic() > end:
                raise SystemExit("the probe does not answer")
            time.sleep(0.1)
        process = Path(f"/proc/{self._process.pid}")
        here = {"files": len(os.listdir(process / "fd")), "threads": len(os.listdir(process / "task"))}
        return here | json.loads(answer.read_text())

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)


class Client:
    """One client after another, each with a random temper, until the time is over."""

    def __init__(
        self, server: Server, found: Findings, seed: int, began: float, seconds: float, only: str | None
    ) -> None:
        self._only = only
        self._server, self._found, self._began, self._end = server, found, began, began + seconds
        self._rng = random.Random(seed)
        noise = np.random.default_rng(seed)
        self._token = ""  # of the session that it can come back to
        self._was_away = False
        self._received: dict[str, int] = {}  # the newest chunk that it has frames of, and how many
        self._picture = noise.integers(0, 255, (96, 160, 3), dtype=np.uint8)
        self._url = ServerAddress.parse(server.url).socket_url

    async def run(self) -> None:
        tempers = (
            self.walk,
            self.walk,
            self.walk,
            self.break_off,
            self.come_back,
            self.read_slowly,
            self.nonsense,
            self.idle,
            self.http,
        )
        while time.monotonic() < self._end:
            temper = getattr(self, self._only) if self._only else self._rng.choice(tempers)
            self._found.did[temper.__name__] += 1
            self._was_away = False
            try:
                await asyncio.wait_for(temper(), 300)
            except ConnectionClosed as closed:
                self._note_close(closed)
            except (OSError, InvalidHandshake) as error:
                self._found.wrong.append(f"{temper.__name__}: {error!r:.300}")
            except TimeoutError:
                self._found.wrong.append(f"{temper.__name__}: no end within 300 s")
            await asyncio.sleep(self._rng.random())

    def _init(self, **fields: Any) -> bytes:
        rng = self._rng
        fields = {
            "size": rng.choice(SIZES),
            "realtime_output_format": rng.choice(FORMATS),
            "num_inference_steps": rng.choice((1, 2)),
            "max_chunks": rng.randint(1, 6),
            "seed": rng.randint(0, 2**31),
            "realtime_output_pacing": rng.random() < 0.2,
            "fps": rng.choice((16, 30, 60)),
            "protocol_extensions": ["session", "queue", "control_ack", "heartbeat", "pause"] * rng.randint(0, 1),
        } | fields
        script = rng.choice((((),), None, (("w",), (), ("l",))))
        return init_message(self._prompt(), self._picture, script, **fields)

    def _prompt(self) -> str:
        return " ".join(self._rng.choices(WORDS, k=self._rng.randint(1, 3)))

    def _event(self, event_id: int) -> bytes:
        rng = self._rng
        keys = {"mode": "state", "transitions": [{"actions": list(rng.choice(KEYS))} for _ in range(rng.randint(0, 5))]}
        kind, payload = rng.choice(
            (
                ("camera_actions", keys),
                ("camera_actions", [list(rng.choice(KEYS)) for _ in range(rng.randint(0, 9))]),
                ("prompt", self._prompt()),
                ("composite_input", {"input_types": ["prompt"], "prompt": self._prompt()}),
                ("jump", None),
                ("prompt", 7),
                ("camera_actions", {"mode": "state", "transitions": "w"}),
            )
        )
        return msgspec.msgpack.encode({"type": "event", "kind": kind, "payload": payload, "event_id": event_id})

    async def _receive(self, socket: ClientConnection, delay: float = 0.0, most: float = 1e9) -> None:
        """Reads and answers with events, until the server closes or ``most`` messages came."""
        received, is_payload = 0, False
        while received < most:
            message = await socket.recv()
            received += 1
            await asyncio.sleep(delay)
            if isinstance(message, str):
                self._found.wrong.append(f"a text message: {message[:100]}")
            elif is_payload:
                is_payload = False
            else:
                fields = msgspec.msgpack.decode(message, type=dict[str, Any])
                is_payload = fields["type"] == "frame_batch_header"
                await self._take(socket, fields, reads_at_once=delay == 0)

    async def _take(self, socket: ClientConnection, fields: dict[str, Any], reads_at_once: bool) -> None:
        found = self._found
        match fields.get("type"):
            case "error":
                found.errors[str(fields.get("code"))] += 1
                if fields.get("code") not in PROVOKED or "object at" in fields["content"]:
                    found.wrong.append(f"error: {fields['content']:.300}")
            case "frame_batch" | "frame_batch_header":
                found.frames += fields["num_frames"]
                index, before = fields["chunk_index"], self._received
                more = before.get("received_frames", 0) if before.get("received_chunk") == index else 0
                self._received = {"received_chunk": index, "received_frames": more + fields["num_frames"]}
            case "session":
                self._token = fields.get("resume_token", "")
                found.resumed += bool(fields.get("resumed"))
            case "rewound":
                found.rewound += 1
                self._received = {}
            case "chunk_stats":
                if fields["event_latency_ms"] is not None and reads_at_once and not self._was_away:
                    chunks = fields["event_latency_ms"] / fields["chunk_total_ms"]
                    found.latencies.append((time.monotonic() - self._began, chunks))
                if fields.get("kept_from") is not None and self._rng.random() < 0.2:
                    chunk = self._rng.randint(fields["kept_from"], fields["chunk_index"])
                    kind = self._rng.choice(("rewind", "branch"))
                    back = {"type": "event", "kind": kind, "payload": {"chunk": chunk}}
                    await socket.send(msgspec.msgpack.encode(back))
                for i in range(self._rng.choice((0, 0, 1, 1, 2, 20))):
                    await socket.send(self._event(1000 * fields["chunk_index"] + i))

    def _note_close(self, closed: ConnectionClosed) -> None:
        code = closed.rcvd.code if closed.rcvd is not None else None
        self._found.closes[str(code)] += 1
        if code not in PROVOKED_CLOSES:
            self._found.wrong.append(f"close {code}: {closed.rcvd.reason if closed.rcvd else ''}")

    # --- tempers ---

    async def walk(self) -> None:
        """Plays to the end, with keys and prompts."""
        async with connect(self._url, max_size=None, compression=None) as socket:
            await socket.send(self._init())
            await self._receive(socket)

    async def break_off(self) -> None:
        """Leaves in the middle, without a word."""
        async with connect(self._url, max_size=None, compression=None) as socket:
            await socket.send(self._init(max_chunks=None))
            await self._receive(socket, most=self._rng.randint(0, 12))
            socket.transport.abort()

    async def come_back(self) -> None:
        """Loses its line again and again, and each time goes on where it was. At the end it says goodbye."""
        rng, self._token = self._rng, ""
        message = self._init(max_chunks=None, protocol_extensions=["session", "queue", "history"])
        for lost in range(rng.randint(2, 12), -1, -1):
            async with connect(self._url, max_size=None, compression=None) as socket:
                await socket.send(message)
                await self._receive(socket, most=rng.randint(1, 9))
                if not self._token or lost == 0:
                    break
                socket.transport.abort()
                self._was_away = True
            known = self._received if rng.random() < 0.7 else {}
            message = msgspec.msgpack.encode({"type": "init", "resume": self._token} | known)

    async def read_slowly(self) -> None:
        """Takes its time with every message."""
        async with connect(self._url, max_size=None, compression=None, max_queue=1) as socket:
            await socket.send(self._init(realtime_output_format="raw", size="160x96"))
            await self._receive(socket, delay=0.3)

    async def nonsense(self) -> None:
        """Sends what is no message, then a good one."""
        rng = self._rng
        async with connect(self._url, max_size=None, compression=None) as socket:
            for _ in range(rng.randint(1, 4)):
                deep = b"\x91" * rng.randint(1, 5000) + b"\xc0"
                bad = rng.choice(
                    (rng.randbytes(rng.randint(0, 4000)), self._init(size="1x1"), self._init(fps=-1), deep)
                )
                await socket.send(bad)
            await socket.send(self._init(max_chunks=1))
            await self._receive(socket)

    async def idle(self) -> None:
        """Connects and says nothing."""
        async with connect(self._url, max_size=None, compression=None):
            await asyncio.sleep(self._rng.random() * 3)

    async def http(self) -> None:
        """Asks the HTTP endpoints."""
        for path in ("/health", "/liveness", "/v1/models", "/metrics", "/nothing"):
            status, _ = await asyncio.to_thread(self._server.get, path)
            if status not in (200, 404):
                self._found.wrong.append(f"{path} answered {status}")


async def soak(server: Server, minutes: float, clients: int, seed: int, only: str | None = None) -> Findings:
    found, began = Findings(), time.monotonic()

    async def measure() -> None:
        while time.monotonic() < began + 60 * minutes:
            await asyncio.sleep(SAMPLE_EVERY_S)
            found.memory.append((time.monotonic() - began, server.memory_mb()))

    crowd = [Client(server, found, seed + i, began, 60 * minutes, only).run() for i in range(clients)]
    await asyncio.gather(measure(), *crowd)
    return found


def at_rest(server: Server, before: dict[str, int]) -> dict[str, int]:
    """The counts once nothing exceeds ``before`` by more than TOLERANCE, or after IDLE_LIMIT_S."""
    end = time.monotonic() + IDLE_LIMIT_S
    while True:
        after = server.counts()
        if all(after[name] <= before[name] + TOLERANCE for name in before) or time.monotonic() > end:
            return after
        time.sleep(2)


def slope_mb_per_hour(memory: list[tuple[float, float]]) -> float:
    """Least-squares slope of the samples after the first quarter of the time."""
    steady = np.array([sample for sample in memory if sample[0] >= memory[-1][0] / 4])
    return float(np.polyfit(steady[:, 0], steady[:, 1], 1)[0] * 3600) if len(steady) > 1 else 0.0


def p99(latencies: list[tuple[float, float]], begin: float, end: float) -> float | None:
    values = [latency for at, latency in latencies if begin <= at < end]
    return float(np.percentile(values, 99)) if len(values) >= 20 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", metavar="TEMPER", help="walk, break_off, come_back, read_slowly, nonsense, idle, http"
    )
    parser.add_argument("--memory-slope", type=float, default=1.0, metavar="MB", help="most growth per hour")
    parser.add_argument("serve_options", nargs="*", metavar="-- OPTIONS", help="of lingbot-rt serve")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.serve_options, Path(folder))
        server.wait_ready()
        # One session first: what is made once, such as thread pools and tables, counts as there from the start.
        asyncio.run(soak(server, 0.2, 2, args.seed + 10**6, args.only))
        before = server.counts()
        found = asyncio.run(soak(server, args.minutes, args.clients, args.seed, args.only))
        after = at_rest(server, before)
        exit_code, log = server.stop(), server.tail()
    seconds = 60 * args.minutes
    first, last = p99(found.latencies, 0, seconds / 4), p99(found.latencies, 3 * seconds / 4, 2 * seconds)
    slope = slope_mb_per_hour(found.memory)
    wrong = list(dict.fromkeys(found.wrong))
    wrong += [
        f"{name}: {before[name]} before, {after[name]} after"
        for name in before
        if after[name] > before[name] + TOLERANCE
    ]
    if slope > args.memory_slope:
        wrong.append(f"memory grows by {slope:.1f} MB an hour")
    if first is not None and last is not None and last > 2 * first:
        wrong.append(f"event latency p99 {first:.1f} chunk times at first, {last:.1f} at the end")
    if exit_code != 0 or "Traceback" in log:
        wrong.append(f"the server's exit code is {exit_code}; its log ends: {log}")
    memory = [round(megabytes, 1) for _, megabytes in found.memory[:: max(1, len(found.memory) // 12)]]
    figures = {
        "minutes": args.minutes, "did": dict(found.did), "frames": found.frames,
        "resumed": found.resumed, "rewound": found.rewound, "errors": dict(found.errors),
        "closes": dict(found.closes), "memory_mb": memory, "memory_slope_mb_per_hour": round(slope, 2),
        "before": before, "after": after,
        "event_latency_p99_chunks": [first, last], "wrong": wrong,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
