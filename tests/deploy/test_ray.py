"""Engines with Ray Serve: two replicas of the built-in model behind one front. Skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lingbot_rt.cli import main
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError
from tests.e2e.served import get_json, running, wire
from tests.server.conftest import init

FIRST_FRAME = Path(__file__).parents[2] / "configs/regression/first_frame.png"


@pytest.mark.parametrize("wrong", [{"ray_max_replicas": 2}, {"ray_replicas": 3, "ray_max_replicas": 2}])
def test_the_most_replicas_are_no_fewer_than_the_least(wrong):
    """--ray-max-replicas alone, or below --ray-replicas, is refused by name."""
    with pytest.raises(ConfigError, match=r"--ray-max-replicas 2 needs --ray-replicas"):
        ServeConfig(**wrong)


def test_without_ray_the_extra_is_named(capsys, monkeypatch):
    """One line says what to install, and the exit code is that of a wrong option."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lingbot_rt.deploy.ray", raising=False)
    assert main(["serve", "--ray-replicas", "2", "--port", "0"]) == 2
    assert "pip install 'lingbot-rt[ray]'" in capsys.readouterr().err


def engines() -> list[int]:
    """The processes of this machine's replicas."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [
        int(line.split()[0]) for line in listed.splitlines() if "ray::ServeReplica:lingbot-rt:EngineReplica" in line
    ]


def test_two_replicas(tmp_path):
    """Sessions spread, a third waits for its turn, and a replica that is killed ends its own session only."""
    pytest.importorskip("ray")
    session = init(size="160x96", first_frame=FIRST_FRAME.read_bytes())
    with running(tmp_path, "--ray-replicas", "2", is_plain=True) as server:
        with wire(server, session) as one, wire(server, session) as two:
            assert [len(client.chunk().frames) for client in (one, two)] == [9, 9]
            [entry] = get_json(f"{server.http}/v1/models")[1]["data"]
            assert (entry["busy"], entry["replicas"]) == (True, {"ready": 2, "busy": 2})
            with wire(server, session | {"protocol_extensions": ["queue"]}) as three:
                assert three.receive()[0]["position"] == 1
                one.socket.socket.close()
                assert len(three.chunk().frames) == 9
                os.kill(engines()[0], signal.SIGKILL)
                lost = {}
                for name, client in (("two", two), ("three", three)):
                    deadline = time.monotonic() + 60
                    kinds: list[str] = []
                    while kinds.count("chunk_stats") < 20 and "error" not in kinds and time.monotonic() < deadline:
                        kinds.append(client.receive()[0]["type"])
                    lost[name] = "error" in kinds
                assert sorted(lost.values()) == [False, True]
        assert server.stop(30) == 0
