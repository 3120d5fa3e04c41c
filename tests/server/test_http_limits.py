"""Connections that never send a request, too many of them, and a process without file descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from lingbot_rt.server import http
from lingbot_rt.server.http import ShortageLog, raise_descriptor_limit
from tests.server.conftest import LIMIT_S, init

REQUEST = b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n"


async def opened(server, *data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for part in data:
        writer.write(part)
    return reader, writer


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LIMIT_S):
        return await reader.read()


@pytest.fixture
def soon(monkeypatch) -> None:
    monkeypatch.setattr(http, "REQUEST_LIMIT_S", 0.5)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"408"),
        (b"GET /health HTTP/1.1\r\nX-Slow: ", b"408"),
        (REQUEST + b"GET /health HT", b"200"),
        (b"POST /liveness HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nslow", b"405"),
    ],
    ids=["silent", "headers without an end", "half a header", "the second request", "a body without an end"],
)
async def test_a_request_that_is_never_complete_ends_its_connection(serve, sent, answer):
    """Whatever part of a request is missing, the connection closes, and what was complete is answered."""
    server = await serve()
    reader, writer = await opened(server, sent)
    got = await until_closed(reader)
    assert got.split(b"\r\n")[0].split(b" ")[1:2] == ([answer] if answer else [])
    writer.close()


@pytest.mark.usefixtures("soon")
async def test_a_byte_now_and_then_does_not_extend_the_limit(serve):
    """The limit counts from the opening of the connection, not from the last byte."""
    server = await serve()
    reader, writer = await opened(server, b"GET /health HTTP/1.1\r\nX-Slow: ")
    ended = asyncio.create_task(until_closed(reader))
    async with asyncio.timeout(LIMIT_S):
        while not ended.done():
            writer.write(b"a")
            await asyncio.sleep(0.02)
    # A byte that crosses the answer on its way resets the connection, and the answer may be lost with it.
    with suppress(ConnectionResetError):
        assert b"408" in await ended
    writer.close()


@pytest.mark.usefixtures("soon")
async def test_a_websocket_has_the_limits_of_a_session_only(serve):
    """The limit of a request ends with the handshake."""
    server = await serve()
    async with server.client() as client:
        await asyncio.sleep(0.8)
        await client.send(init(max_chunks=1))
        assert len((await client.chunk()).frames) == 9


async def test_connections_beyond_the_limit_are_refused_in_words(serve, caplog):
    """--max-connections counts HTTP and WebSocket; further ones get 503 and one log line, and room is used again."""
    server = await serve(max_connections=3)
    silent = [await opened(server) for _ in range(2)]
    async with server.client() as client:
        for _ in range(20):
            reader, writer = await opened(server, REQUEST)
            answer = await until_closed(reader)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"--max-connections" in answer
            writer.close()
        assert len([record for record in caplog.records if "--max-connections" in record.getMessage()]) == 1
        silent[0][1].close()
        await asyncio.sleep(0)
        async with asyncio.timeout(LIMIT_S):
            while True:
                reader, writer = await opened(server, REQUEST)
                line = await reader.readline()
                writer.close()
                if b" 200 " in line:
                    break
        await client.send(init(max_chunks=1))
        assert len((await client.chunk()).frames) == 9
    silent[1][1].close()


async def test_a_silent_connection_beyond_the_limit_does_not_stay(serve, monkeypatch):
    """It is told and closed although it asks nothing."""
    monkeypatch.setattr(http, "REFUSED_LIMIT_S", 0.1)
    server = await serve(max_connections=1)
    _, kept = await opened(server)
    reader, writer = await opened(server)
    assert b" 503 " in await until_closed(reader)
    writer.close()
    kept.close()


def test_the_limit_of_open_files_is_raised_to_what_the_system_allows():
    """Soft limit = hard limit; nothing happens when it is there already."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
        for _ in range(2):
            raise_descriptor_limit()
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_shortage_is_one_log_line(caplog):
    """Thousands of failed accepts are one line without a traceback; other errors keep theirs."""
    loop, handler = asyncio.new_event_loop(), ShortageLog()
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            error = OSError(errno.EMFILE, "Too many open files")
            handler(loop, {"message": "socket.accept() out of system resource", "exception": error})
        assert [(record.levelname, record.exc_info) for record in caplog.records] == [("ERROR", None)]
        assert "Too many open files" in caplog.text
        handler(loop, {"message": "something else", "exception": ValueError("odd")})
        assert "something else" in caplog.text
    loop.close()


SERVER = """
import asyncio, socket, sys
from lingbot_rt.config import ServeConfig
from lingbot_rt.server import http
from lingbot_rt.server.app import Server, create_app
from lingbot_rt.telemetry import configure_logging
from tests.server.fake_engine import FakeEngine

configure_logging("info")
http.REQUEST_LIMIT_S = 1.0
config = ServeConfig(port=0)
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    server = Server(create_app(config, FakeEngine()), config)
    loop_factory = None if sys.argv[1] == "asyncio" else server.config.get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(server.serve(sockets=[listener]))
"""


@pytest.mark.parametrize("loop", ["asyncio", "auto"])
def test_a_process_without_descriptors_serves_on(loop):
    """With 128 descriptors and 200 silent sockets /health answers again, and the log stays short."""
    limit = (128, 128)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
        text=True,
    )
    assert process.stdout is not None
    silent = []
    try:
        port = int(process.stdout.readline())
        silent = [socket.create_connection(("127.0.0.1", port), LIMIT_S) for _ in range(200)]
        assert answers(port)
    finally:
        for each in silent:
            each.close()
        process.terminate()
        log = process.communicate(timeout=LIMIT_S)[1]
    assert "Traceback" not in log
    assert len(log.splitlines()) < 20, log[:2000]


def answers(port: int) -> bool:
    deadline = time.monotonic() + 2 * LIMIT_S
    while time.monotonic() < deadline:
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as asking:
            asking.sendall(REQUEST.replace(b"/liveness", b"/health"))
            try:
                if b" 200 " in asking.recv(64):
                    return True
            except OSError:
                pass
        time.sleep(0.05)
    return False
