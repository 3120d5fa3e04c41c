"""``lingbot-rt serve --num-gpus 2`` as a user meets it, and what a client sees when a rank dies."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from lingbot_rt.cli import main
from tests.e2e.served import running, wire

FAREWELL_LIMIT_S = 60


def children(process: int) -> list[int]:
    """The child processes of all its threads."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, path.read_text().split())
    return found


def is_alive(process: int) -> bool:
    """Whether the process runs. A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def init(golden) -> dict:
    picture = golden("e2e/first_frame.png").read_bytes()
    return {
        "type": "init",
        "prompt": "a quiet street",
        "size": "96x64",
        "first_frame": picture,
        "realtime_output_format": "raw",
    }


def test_a_rank_killed_in_a_session(golden, tmp_path):
    """The client gets chunks, then an error that names the rank; the service exits 1 and leaves no process."""
    flags = ("--num-gpus", "2", "--ulysses-degree", "2", "--device", "cpu", "--warmup", "false")
    # Longer than the default, for busy machines. A killed rank is noticed at once.
    flags += ("--rank-timeout-s", "120")
    with running(tmp_path, *flags, is_plain=True) as server, wire(server, init(golden)) as client:
        (worker,) = children(server.process.pid)
        assert len(client.chunk().frames) == 9
        os.kill(worker, signal.SIGKILL)
        message: dict = {}
        while message.get("type") != "error":
            message, _ = client.receive()
        assert message["content"] == "error during generate loop: rank 1 was killed by SIGKILL"
        assert server.process.wait(FAREWELL_LIMIT_S) == 1
        assert not is_alive(worker)


def test_ranks_that_cannot_be_are_one_line(capsys):
    """Heads that ranks do not divide: exit code 2 and one line before anything is loaded."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["serve", "--port", "0", "--num-gpus", "3", "--device", "cpu"]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    line = "lingbot-rt: --num-gpus 3 does not divide the 4 heads of builtin; use 1, 2 or 4\n"
    assert capsys.readouterr().err == line
