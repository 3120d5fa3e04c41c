"""The page without its server: files over HTTP, and made-up servers whose answers a test decides."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

WEBUI = Path(__file__).parents[2] / "webui"


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def static_page() -> Iterator[str]:
    """The page as any static server delivers it. Yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(WEBUI))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def path_proxy(port: int, prefix: str, *, passes_upgrade: bool = True) -> Iterator[str]:
    """A reverse proxy that serves ``port`` below ``prefix`` ("/world/") and nothing beside it. Yields its address."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            first = self.rfile.readline().decode("latin-1").split(" ")
            lines = list(iter(lambda: self.rfile.readline().decode("latin-1"), "\r\n"))
            if "" in lines or len(first) != 3 or not first[1].startswith(prefix):
                self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            upgrades = passes_upgrade and any(line.lower().startswith("upgrade:") for line in lines)
            hop = ("connection:", "upgrade:")
            lines = [line for line in lines if not line.lower().startswith(hop)]
            lines.append("Connection: Upgrade\r\nUpgrade: websocket\r\n" if upgrades else "Connection: close\r\n")
            first[1] = first[1].replace(prefix, "/", 1)
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                upstream.sendall("".join([" ".join(first), *lines, "\r\n"]).encode("latin-1"))
                up = threading.Thread(target=_pump, args=(self.rfile.read1, upstream))
                up.start()
                _pump(lambda: upstream.recv(65536), self.connection)
                up.join()

    class Proxy(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Proxy(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}{prefix}"
        finally:
            proxy.shutdown()
            thread.join()


class CutLine:
    """A relay to a port of this machine whose open connections can be cut."""

    def __init__(self, port: int) -> None:
        outer, self._open = self, set[socket.socket]()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    upstream = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    return
                ends = {self.request, upstream}
                outer._open |= ends
                with upstream:
                    up = threading.Thread(target=_pump, args=(lambda: self.request.recv(65536), upstream))
                    up.start()
                    _pump(lambda: upstream.recv(65536), self.request)
                    up.join()
                outer._open -= ends

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def cut(self) -> None:
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> CutLine:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _pump(read: Callable[[], bytes], to: socket.socket) -> None:
    with suppress(OSError):
        while data := read():
            to.sendall(data)
    with suppress(OSError):
        to.shutdown(socket.SHUT_RDWR)


class FakeApi:
    """Answers ``BASE/v1/models`` inside the browser. ``is_up`` and ``key`` may change at any time."""

    def __init__(self, page: Any, base: str, *, key: str | None = None) -> None:
        self.is_up = True
        self.key = key
        self.model: dict[str, Any] = {"device": "cpu", "sizes": ["160x96", "832x480"], "default_size": "160x96"}
        self.status = 200
        self.asked: list[dict[str, str]] = []  # the headers of each request
        page.route(f"{base}/v1/models", self._answer)

    def _answer(self, route: Any) -> None:
        self.asked.append(route.request.headers)
        if not self.is_up:
            route.abort("connectionrefused")
            return
        refused = self.key is not None and route.request.headers.get("authorization") != f"Bearer {self.key}"
        status = 401 if refused else self.status
        body = {"data": [{"id": "a-world", **self.model}]} if status == 200 else {"detail": "no"}
        route.fulfill(
            status=status,
            body=json.dumps(body),
            headers={"Content-Type": "application/json", "Access-Control-Allow-Origin": "*"},
        )


class FakeWorld:
    """Answers the WebSocket inside the browser: every event gets a batch of frames that carries it."""

    def __init__(self, page: Any, base: str) -> None:
        self.inits: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.chunk_ms = 100.0
        self.place_in_line = 0
        self.compiles = False  # before a session opens; ``open_session`` then opens it
        self._picture = (WEBUI / "presets" / "snow.webp").read_bytes()
        self._chunk = 0
        self._stats: dict[str, Any] = {}  # beside those of every chunk
        self._route: Any = None
        page.route_web_socket(re.compile(re.escape(base.replace("http", "ws", 1))), self._opened)

    def send(self, message: dict[str, Any]) -> None:
        self._route.send(msgspec.msgpack.encode(message))

    def chunk(self, event_id: int | None = None) -> None:
        """Sends a chunk of four frames."""
        self.send(
            {
                "type": "frame_batch",
                "content_type": "image/webp",
                "num_frames": 4,
                "chunk_index": self._chunk,
                "event_id": event_id,
                "payload_lengths": [len(self._picture)] * 4,
                "payload": self._picture * 4,
            }
        )
        stats = {"chunk_index": self._chunk, "num_frames": 4, "chunk_total_ms": self.chunk_ms, "ws_write_ms": 0.0}
        self.send({"type": "chunk_stats", **stats, **self._stats})
        self._chunk += 1
        if self._chunk == self.inits[-1].get("max_chunks"):
            self.close(1000, "generation complete")

    def open_session(self) -> None:
        self.send({"type": "session", "session_id": "x", "capabilities": {"extensions": []}})
        self.chunk()

    def close(self, code: int, reason: str = "") -> None:
        self._route.close(code=code, reason=reason)

    def _opened(self, route: Any) -> None:
        self._route, self._chunk = route, 0
        route.on_message(self._heard)

    def _heard(self, data: str | bytes) -> None:
        assert isinstance(data, bytes)
        message = msgspec.msgpack.decode(data)
        if message["type"] == "init":
            self.inits.append(message)
            if self.place_in_line:
                self.send({"type": "queue", "position": self.place_in_line})
                return
            if self.compiles:
                self.send({"type": "warming", "session_id": "x", "size": message["size"], "expected_ms": 41300})
                return
            self.open_session()
        else:
            self.events.append(message)
            if "event_id" in message:
                self.chunk(message["event_id"])


class FakeKeptWorld(FakeWorld):
    """One that keeps its session after a lost line, goes back and is saved. A key event gives one chunk, as there."""

    def __init__(self, page: Any, base: str) -> None:
        super().__init__(page, base)
        self.has_world = True  # for whoever comes with the token
        self.answers = True  # inits
        self.is_exact = True
        self.refusal: str | None = None  # of going back and saving
        self.world = b"a world"
        self._branches = 1
        self._stats = {"kept_from": 0, "branch": 0}

    def lose_line(self) -> None:
        self.close(1001)

    def open_session(self) -> None:
        init = self.inits[-1]
        resumed = isinstance(init.get("resume"), str)
        if resumed and not self.has_world:
            content = "invalid generate request: resume: no session has this token"
            self.send({"type": "error", "code": "invalid_init", "field": "resume", "content": content})
            return
        self._chunk = init.get("received_chunk", -1) + 1
        capabilities = {"extensions": ["session", "history"]}
        message = {"type": "session", "session_id": "x", "capabilities": capabilities, "resume_token": "t" * 43}
        place = {"resumed": True, "chunk_index": self._chunk, "branch": 0, "exact": True} if "resume" in init else {}
        self.send(message | {"resume_s": 60.0} | place)
        self.chunk()

    def _heard(self, data: str | bytes) -> None:
        assert isinstance(data, bytes)
        message = msgspec.msgpack.decode(data)
        if message["type"] == "init" and not self.answers:
            self.inits.append(message)
            return
        if message["type"] == "init" or message["kind"] not in ("rewind", "branch", "save"):
            super()._heard(data)
            return
        self.events.append(message)
        if self.refusal is not None:
            self.send({"type": "error", "code": "invalid_event", "content": self.refusal} | _id_of(message))
            return
        if message["kind"] == "save":
            self.send({"type": "world", "chunk_index": self._chunk, "payload": self.world} | _id_of(message))
            return
        self._chunk, branch = message["payload"]["chunk"], message["payload"]["branch"]
        if message["kind"] == "branch":
            branch, self._branches = self._branches, self._branches + 1
        self._stats["branch"] = branch
        place = {"chunk_index": self._chunk, "branch": branch, "exact": self.is_exact}
        self.send({"type": "rewound"} | place | _id_of(message))
        self.chunk()


def _id_of(message: dict[str, Any]) -> dict[str, Any]:
    return {"event_id": message["event_id"]}
