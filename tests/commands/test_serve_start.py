"""``serve`` in a process of its own: empty variables, keys, origins, consoles, and a stop while the model loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack

import msgspec
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.e2e.served import running


@pytest.fixture(scope="module")
def model(golden) -> list[str]:
    return ["--model-path", str(golden("e2e/model")), "--device", "cpu", "--warmup", "false"]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server whose variables are empty or end in a line break, in a folder with a picture."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "private.png").write_bytes(b"picture")
    flags = ["--served-model-name", "wörld", "--cors-allow-origins", "https://world.example/"]
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("LINGBOT_RT_FIRST_FRAME_DIR", "")
            patch.setenv("LINGBOT_RT_API_KEY", "secret\n")
            patch.setenv("LINGBOT_RT_API_KEYS", "x")
            patch.setenv("PYTHONIOENCODING", "ascii")
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            it = stack.enter_context(running(folder, *model, *flags))
        yield it


def get(url: str, **headers: str) -> tuple[int, str | None]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers["Access-Control-Allow-Origin"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


def test_a_key_that_ends_in_a_line_break(server):
    """Clients send the key without it."""
    codes = [get(f"{server.http}/v1/models", Authorization=f"Bearer {key}")[0] for key in ("secret", "other", "")]
    assert codes == [200, 401, 401]


def test_an_origin_with_a_slash(server):
    """The origin is allowed as browsers send it, on HTTP and on the WebSocket; another one is not."""
    key = {"Authorization": "Bearer secret"}
    origin = "https://world.example"
    assert get(f"{server.http}/v1/models", Origin=origin, **key) == (200, origin)
    with connect(server.ws, additional_headers=key | {"Origin": origin}, proxy=None):
        pass
    with (
        pytest.raises(InvalidStatus, match="403"),
        connect(server.ws, additional_headers=key | {"Origin": "https://other.example"}, proxy=None),
    ):
        pass


def test_an_empty_folder_of_first_frames_opens_nothing(server):
    """The answer is the same for a file that exists and for one that does not."""
    answers = []
    for name in ("private.png", "missing.png"):
        with connect(server.ws, additional_headers={"Authorization": "Bearer secret"}, proxy=None) as socket:
            socket.send(msgspec.msgpack.encode({"type": "init", "prompt": "A street.", "first_frame": name}))
            error = msgspec.msgpack.decode(socket.recv(timeout=30))
        assert (error["type"], error["code"], error["field"]) == ("error", "invalid_init", "first_frame")
        assert "--first-frame-dir" in error["content"]
        answers.append(error["content"].replace(name, "NAME"))
    assert answers[0] == answers[1]


def test_the_banner_and_the_warning(server):
    """The misspelt variable is named once, and the banner shows what an ASCII console can show. SIGTERM ends with 0."""
    log = server.log.read_text()
    assert "w\\xf6rld on cpu" in log
    (line,) = [line for line in log.splitlines() if "LINGBOT_RT_API_KEYS" in line]
    assert "LINGBOT_RT_API_KEY)" in line
    assert "Traceback" not in log
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


PROGRAM = """
import sys, threading
from lingbot_rt.engine.engine import Engine
held = threading.Event()
def load(self):
    print("loading", flush=True)
    held.wait()
Engine._load = load
from lingbot_rt.cli import main
sys.exit(main(["serve", "--port", "0", "--device", "cpu"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_model_loads(number):
    """Exit code 0 and one line, although the thread that loads cannot be interrupted."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.splitlines() == ["lingbot-rt: stopped while the model was loading"]


STARTING = """
import sys
from lingbot_rt.commands import serve
def require(config):
    print("starting", flush=True)
    while True:
        pass
serve.require_folders = require
from lingbot_rt.cli import main
sys.exit(main(["serve", "--port", "0"]))
"""


def test_a_stop_before_the_server_runs():
    """The same before anything serves: no exception at a random place."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "lingbot-rt: stopped by SIGTERM\n")
