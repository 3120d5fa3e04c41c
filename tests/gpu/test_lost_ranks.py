"""A service on two GPUs that loses one of its processes: what the client is told, and what is left.

The tests' own process leaves the GPUs alone: in a run where it had used them, its CUDA context failed with an illegal
memory access while a service lost its second rank.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from lingbot_rt.config import ENDPOINT
from tests.parallel import broken_worker
from tests.parallel.test_serve import children, is_alive

from .test_served import LIMIT_S, connect, messages_of, msgspec, wait_for_health


def used_mib() -> list[int]:
    """Memory in use on each of this process's first two GPUs, by all processes."""
    if shutil.which("nvidia-smi") is None:
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = [
        "nvidia-smi",
        *([] if seen is None else [f"--id={seen}"]),
        "--query-gpu=memory.used",
        "--format=csv,noheader,nounits",
    ]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=LIMIT_S)
    return [int(line) for line in answer.stdout.split() if line.isdigit()][:2]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(len(used_mib()) < 2, reason="fewer than two GPUs")]

SERVER = """
import sys
from lingbot_rt.cli import main
from lingbot_rt.engine import worker
fault, script, *flags = sys.argv[1:]
if fault != "kill":
    worker._COMMAND = (sys.executable, script, fault, "1")
sys.exit(main(flags))
"""

RANK_TIMEOUT_S = 20


@pytest.mark.parametrize(
    ("fault", "compile", "expected"),
    [
        ("kill", "false", "rank 1 was killed by SIGKILL"),
        ("raise", "false", "rank 1 failed: ValueError: the kernel said no"),
        ("memory", "false", "rank 1 failed: OutOfMemoryError: CUDA out of memory"),
        ("stall", "false", "rank 1 stalled: for "),
        # Compiled, the ranks write into each other's memory.
        ("kill", "true", "rank 1 was killed by SIGKILL"),
        ("stall", "true", "rank 1 stalled: for "),
    ],
)
def test_a_lost_rank_ends_the_service(fault, compile, expected, tmp_path):
    """The client gets an error that names the rank, the service exits with 1 in time, and neither a process nor memory
    of a card is left."""
    before = used_mib()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, fault, broken_worker.__file__, "serve", "--port", str(port)]
    command += ["--num-gpus", "2", "--device", "cuda", "--warmup", "false", "--compile", compile]
    command += ["--rank-timeout-s", str(RANK_TIMEOUT_S)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    workers: list[int] = []
    try:
        wait_for_health(port, 200, process, log)
        workers = children(process.pid)
        picture = b"P6 8 8 255\n" + bytes(8 * 8 * 3)
        init = {"type": "init", "prompt": "A street.", "first_frame": picture, "size": "96x64"}
        with connect(f"ws://127.0.0.1:{port}{ENDPOINT}", compression=None, max_size=None) as client:
            client.send(msgspec.msgpack.encode(init))
            messages = messages_of(client)
            if fault == "kill":
                next(message for message in messages if message["type"] == "chunk_stats")
                os.kill(workers[0], signal.SIGKILL)
            lost_at = time.monotonic()
            error = next(message for message in messages if message["type"] == "error")
            assert expected in error["content"], log.read_text()
        assert process.wait(LIMIT_S) == 1, log.read_text()
        took_s = time.monotonic() - lost_at
        print(f"\n{fault}: {error['content']}; ended after {took_s:.1f} s, limit {RANK_TIMEOUT_S}")
        # Those faults come in the first chunk, whose kernels load meanwhile.
        assert took_s <= RANK_TIMEOUT_S * (1 if fault == "kill" else 2)
        assert len(workers) == 1
        assert not is_alive(workers[0])
        assert all(now <= then + 64 for now, then in zip(used_mib(), before, strict=True))
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
