"""A ``lingbot-rt serve`` process on a free port, and a wire client that shares no code with the package."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from websockets.sync.client import ClientConnection, connect

from tests.preloaded import PreloadedProcess

START_LIMIT_S = 240

_ADDRESS = re.compile(r"^  WebSocket  ws://\S+:(\d+)/", re.MULTILINE)


@dataclass
class Server:
    """A running server: its port, process and log."""

    port: int
    process: subprocess.Popen | PreloadedProcess
    log: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime_video/generate"

    def wait_for_log(self, text: str, limit_s: float = 30) -> str:
        """The log once it has ``text``: it may come a moment after what the client sees."""
        deadline = time.monotonic() + limit_s
        while text not in (log := self.log.read_text()):
            assert time.monotonic() < deadline, log
            time.sleep(0.02)
        return log

    def stop(self, limit_s: float = 10) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(limit_s)

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024


def get_json(url: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@contextmanager
def running(folder: Path, *flags: str, is_plain: bool = False) -> Iterator[Server]:
    """Starts ``lingbot-rt serve`` with ``flags`` on a free port and waits until its banner tells which.

    With ``is_plain`` the process is started as a user starts it, and imports everything itself.
    """
    log = folder / f"serve-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "lingbot_rt", "serve", "--port", "0", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process: subprocess.Popen | PreloadedProcess
    if is_plain:
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    else:
        process = PreloadedProcess(command, env=env, log=log)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while (told := _ADDRESS.search(log.read_text() if log.exists() else "")) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Server(int(told[1]), process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@dataclass
class Chunk:
    frames: list[np.ndarray] = field(default_factory=list)
    event_ids: list[int | None] = field(default_factory=list)
    stats: dict = field(default_factory=dict)


class WireClient:
    """Decodes raw and delta-gzip frames in one or two messages per batch. Shares no code with the package."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.other: list[dict] = []
        self._previous: np.ndarray | None = None

    def send(self, message: dict) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> tuple[dict, bytes | None]:
        message = msgspec.msgpack.decode(self.socket.recv(timeout=30))
        if message["type"] == "frame_batch_header":
            return message, self.socket.recv(timeout=30)
        return message, message.pop("payload", None)

    def chunk(self) -> Chunk:
        """The next chunk, up to its chunk_stats."""
        chunk = Chunk()
        while True:
            message, payload = self.receive()
            if message["type"] == "chunk_stats":
                chunk.stats = message
                return chunk
            if payload is None:
                self.other.append(message)
                assert message["type"] != "error", message
                continue
            frames = self._frames(message, payload)
            chunk.frames.extend(frames)
            chunk.event_ids.extend([message.get("event_id")] * len(frames))

    def _frames(self, header: dict, payload: bytes) -> list[np.ndarray]:
        shape = (header["num_frames"], header["height"], header["width"], 3)
        if header["content_type"] == "application/x-raw-rgb":
            return list(np.frombuffer(payload, np.uint8).reshape(shape))
        assert header["content_type"] == "application/x-raw-rgb-delta-gzip"
        deltas = np.frombuffer(gzip.decompress(payload), np.uint8).reshape(shape)
        reference = (
            self._previous if header.get("delta_reference") == "previous-frame" else np.zeros(shape[1:], np.uint8)
        )
        frames = []
        for delta in deltas:
            reference = reference ^ delta
            frames.append(reference)
        self._previous = reference
        return frames


@contextmanager
def wire(server: Server, init: dict | None = None) -> Iterator[WireClient]:
    with connect(server.ws, max_size=None, compression=None) as socket:
        client = WireClient(socket)
        if init is not None:
            client.send(init)
        yield client
