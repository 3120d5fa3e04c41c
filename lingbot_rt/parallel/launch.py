"""How the ranks come to be: rank 0 starts the others on its host, or torchrun starts all, on any number of hosts.

Either way a process finds its place in torchrun's environment variables: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.interface import VARIABLE, choose_interface

LOOPBACK = "127.0.0.1"

_WORKER = (sys.executable, "-m", "lingbot_rt.engine.worker")

END_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """One process among all."""

    rank: int
    world: int
    local_rank: int  # which of its host's GPUs it takes
    address: str  # where rank 0's store listens
    port: int
    run: str  # tells this run's keys from those of the one before, when torchrun restarts
    store_is_there: bool  # torchrun's agent runs the store; rank 0 need not

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """None outside torchrun and for a process that is alone."""
        if "RANK" not in environment or "MASTER_PORT" not in environment:
            return None
        return cls(
            rank=int(environment["RANK"]),
            world=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            run=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            store_is_there=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def environment(self) -> dict[str, str]:
        """What a process needs in order to find this place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def device(self, name: str) -> torch.device:
        """The rank's own device, made current. ``name``: cuda, or cpu."""
        if name != "cuda":
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def join(self, group: RankGroup, store: dist.Store, device: torch.device, timeout_s: float) -> None:
        """Makes ``group`` one with those of all other processes, once they have all come: within ``timeout_s``."""
        choose_interface(store, self.rank, self.world, self.address, timedelta(seconds=timeout_s))
        group.join(store, device)

    def connect(self, timeout_s: float) -> dist.Store:
        """A connection to the store of its own: one that waits does not hold up another thread's."""
        store = dist.TCPStore(
            self.address,
            self.port,
            is_master=self.rank == 0 and not self.store_is_there,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            # A second connection of rank 0 finds the server that its first one opened.
            multi_tenant=True,
        )
        return dist.PrefixStore(f"lingbot_rt/{self.run}", store)


def require_ranks(config: ServeConfig, heads: int | None = None) -> None:
    """Raises ConfigError when --num-gpus asks for devices, or for a share of the heads, that cannot be.

    ``heads``: of a model that is no folder.
    """
    place = Place.from_environment()
    if place is not None and place.world != config.num_gpus:
        raise ConfigError(
            f"--num-gpus {config.num_gpus}: the launcher started {place.world} processes; use --num-gpus {place.world}",
            field="num_gpus",
        )
    if config.num_gpus == 1:
        return
    local = config.num_gpus if place is None else int(os.environ.get("LOCAL_WORLD_SIZE", place.world))
    found = torch.cuda.device_count()
    if uses_cuda(config) and found < local:
        raise ConfigError(
            f"--num-gpus {config.num_gpus}: this machine has {found} CUDA device{'s' * (found != 1)}", field="num_gpus"
        )
    heads = heads or open_checkpoint(config.model_path).dit_config.num_attention_heads
    if heads % config.num_gpus:
        fitting = ", ".join(str(n) for n in range(1, config.num_gpus) if heads % n == 0)
        raise ConfigError(
            f"--num-gpus {config.num_gpus} does not divide the {heads} heads of {config.model_path}; use {fitting}",
            field="num_gpus",
        )


def uses_cuda(config: ServeConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def open_place(world: int, timeout_s: float) -> tuple[Place, dist.Store]:
    """Rank 0 outside torchrun: a store on the loopback interface, at a port of its own, that followers can find."""
    # Nothing of the ranks' talk leaves the host: neither the store nor gloo's own connections.
    if sys.platform == "linux":
        os.environ.setdefault(VARIABLE, "lo")
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        server = dist.TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    place = Place(rank=0, world=world, local_rank=0, address=LOOPBACK, port=port, run="0", store_is_there=True)
    return place, dist.PrefixStore(f"lingbot_rt/{place.run}", server)


def worker_command(config: ServeConfig) -> list[str]:
    """Starts a follower of a server."""
    # A key that opens the server is no business of its.
    return [*_WORKER, json.dumps(dataclasses.asdict(dataclasses.replace(config, api_key=None)))]


def start_followers(command: Sequence[str], place: Place) -> dict[int, subprocess.Popen[bytes]]:
    """One process of ``command`` for each of the ranks 1 .. P - 1."""
    processes = {}
    for rank in range(1, place.world):
        own = dataclasses.replace(place, rank=rank, local_rank=rank)
        processes[rank] = subprocess.Popen(
            command,
            env=os.environ | own.environment(),
            stdin=subprocess.DEVNULL,
        )
    return processes


def end_followers(processes: Mapping[int, subprocess.Popen[bytes]], *, grace_s: float = END_GRACE_S) -> None:
    """Waits ``grace_s`` for those that were told to end; none is left after."""
    deadline = time.monotonic() + grace_s
    for process in processes.values():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    for process in processes.values():
        process.wait()
