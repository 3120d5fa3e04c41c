"""``lingbot-rt play``: which page it opens, and when it starts a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from queue import Queue

import pytest

from lingbot_rt.cli import main
from lingbot_rt.commands import play
from tests.server.fake_engine import FakeEngine


@contextmanager
def answering(status: int, body: str) -> Iterator[int]:
    """The port of a server that gives this answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def opened(monkeypatch) -> Queue[str]:
    """The pages that the browser was asked to show, perhaps by another thread."""
    pages: Queue[str] = Queue()
    monkeypatch.setenv("BROWSER", "test")
    monkeypatch.setattr("webbrowser.open", lambda url: not pages.put(url))
    return pages


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The addresses at which a server was started. It is ready at once and ends."""
    addresses: list[str] = []

    def serve(config, on_ready):
        addresses.append(f"{config.host}:{config.port}")
        if on_ready is not None:
            on_ready(f"http://{config.host}:{config.port}")
        return 0

    monkeypatch.setattr(play, "serve_until_stopped", serve)
    return addresses


STATUS = json.dumps({"stage": "loading weights", "progress": 0.5})


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("flag", ["--port", "--url"])
def test_a_server_that_runs(status, flag, opened, capsys):
    """Its page is opened, also while its model loads. Nothing is started."""
    with answering(status, STATUS) as port:
        page = f"http://127.0.0.1:{port}"
        assert main(["play", flag, str(port) if flag == "--port" else page]) == 0
        assert page in capsys.readouterr().out
        assert opened.get(timeout=60) == page
        assert main(["play", "--no-browser", "--port", str(port)]) == 0
        assert page in capsys.readouterr().out
    assert opened.empty()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_server_runs(opened, started):
    """One is started at that address, and its page is opened when it is ready."""
    port = free_port()
    assert main(["play", "--port", str(port)]) == 0
    assert main(["play", "--url", f"http://127.0.0.1:{port}"]) == 0
    assert started == [f"127.0.0.1:{port}"] * 2
    assert [opened.get(timeout=60) for _ in range(2)] == [f"http://127.0.0.1:{port}"] * 2
    assert main(["play", "--port", str(port), "--no-browser"]) == 0
    assert len(started) == 3
    assert opened.empty()


def test_a_server_of_another_kind(opened, started, capsys):
    """It is neither opened nor replaced: the message names the address."""
    with answering(200, "<html>") as port:
        assert main(["play", "--port", str(port)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "no lingbot_rt server" in line
    assert opened.empty()
    assert started == []


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--url", "http://127.0.0.1:1", "--port", "2"], 2, "--port"),
        (["--url", "http://127.0.0.1:1", "--host", "::1"], 2, "--host"),
        (["--url", "https://127.0.0.1:1"], 1, "https://127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1/world"], 1, "http://127.0.0.1:1/world"),
    ],
)
def test_addresses_at_which_nothing_can_be_started(words, code, named, opened, started, capsys):
    """One line names what is wrong with them."""
    assert main(["play", *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert opened.empty()
    assert started == []


def test_a_machine_without_a_screen(monkeypatch, capsys):
    """No browser of the terminal is started: the address is printed."""
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("webbrowser.open", lambda url: pytest.fail("a browser was asked"))
    with answering(200, STATUS) as port:
        assert main(["play", "--port", str(port)]) == 0
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


def test_ctrl_c_ends_a_server_that_was_started(monkeypatch, capsys):
    """The browser gets the page once the model is ready, and the stop signal ends the command with exit code 0."""
    pages: list[str] = []

    class LivingEngine(FakeEngine):
        is_lost = False

    def open_page(url: str) -> bool:
        pages.append(url)
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr("lingbot_rt.engine.engine.Engine", lambda config: LivingEngine())
    monkeypatch.setattr("lingbot_rt.telemetry.configure_logging", lambda *args, **options: None)
    monkeypatch.setattr("lingbot_rt.commands.serve._end_now", lambda why: None)  # it would end the tests
    monkeypatch.setenv("BROWSER", "test")
    monkeypatch.setattr("webbrowser.open", open_page)
    assert main(["play", "--port", "0"]) == 0
    (page,) = pages
    assert page in capsys.readouterr().out
