"""How the ranks are started: rank 0 starts the others on its host, or torchrun starts all, on any number of hosts.

Either way a process finds its rank in torchrun's environment variables: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import dataclasses
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
from lingbot_rt.config_values import environment_value
from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.interface import VARIABLE, choose_interface

LOOPBACK = "127.0.0.1"

STOP_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One process of the service: its rank, its GPU and where rank 0's store is."""

    rank: int
    world: int  # number of ranks
    local_rank: int  # the index of its GPU on its host
    address: str  # where rank 0's store listens
    port: int
    run_id: str  # changes when torchrun restarts, so that the store's keys of the run before are not read
    has_store: bool  # the store runs already; otherwise rank 0 starts it on its first connection

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo | None:
        """None when no launcher, torchrun or rank 0, started this process."""
        if environment_value("RANK", environment) is None or environment_value("MASTER_PORT", environment) is None:
            return None
        return cls(
            rank=int(environment["RANK"]),
            world=int(environment["WORLD_SIZE"]),
            local_rank=int(environment_value("LOCAL_RANK", environment) or environment["RANK"]),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            run_id=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def environment(self) -> dict[str, str]:
        """The variables that ``from_environment`` reads in the process of this rank."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def device(self, name: str) -> torch.device:
        """The rank's own device, made current. ``name``: cuda or cpu."""
        if name != "cuda":
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def join(self, group: RankGroup, store: dist.Store, device: torch.device, timeout_s: float) -> None:
        """Joins ``group`` with all other ranks. Raises RuntimeError when a rank does not come within ``timeout_s``."""
        choose_interface(store, self.rank, self.world, self.address, timedelta(seconds=timeout_s))
        group.join(store, device)

    def connect(self, timeout_s: float) -> dist.Store:
        """A new connection to the store: each thread needs its own, as a waiting one blocks all who share it."""
        store = dist.TCPStore(
            self.address,
            self.port,
            is_master=self.rank == 0 and not self.has_store,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            # Rank 0's second connection uses the server that its first one opened.
            multi_tenant=True,
        )
        return dist.PrefixStore(f"lingbot_rt/{self.run_id}", store)


def require_ranks(config: ServeConfig, heads: int | None = None) -> None:
    """Raises ConfigError when --num-gpus does not fit the launcher, the machine or the model's attention heads.

    ``heads``: read from the model's folder when None.
    """
    info = RankInfo.from_environment()
    if info is not None and info.world != config.num_gpus:
        raise ConfigError(
            f"--num-gpus {config.num_gpus}: the launcher started {info.world} processes; use --num-gpus {info.world}",
            field="num_gpus",
        )
    if config.num_gpus == 1:
        return
    local = config.num_gpus if info is None else int(environment_value("LOCAL_WORLD_SIZE") or info.world)
    found = torch.cuda.device_count()
    if uses_cuda(config) and found < local:
        raise ConfigError(
            f"--num-gpus {config.num_gpus}: this machine has {found} CUDA device{'s' * (found != 1)}", field="num_gpus"
        )
    if heads is None:
        folder = open_checkpoint(config.model_path, load_format=config.load_format)
        heads = folder.dit_config.num_attention_heads
    if heads % config.num_gpus:
        *smaller, largest = (str(n) for n in range(1, heads + 1) if heads % n == 0)
        fitting = f"{', '.join(smaller)} or {largest}" if smaller else largest
        raise ConfigError(
            f"--num-gpus {config.num_gpus} does not divide the {heads} heads of {config.model_path}; use {fitting}",
            field="num_gpus",
        )


def uses_cuda(config: ServeConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def open_local_store(world: int, timeout_s: float) -> tuple[RankInfo, dist.Store]:
    """On rank 0, outside torchrun: a store on the loopback interface, at a free port."""
    # All traffic between the ranks stays on this host: the store's and gloo's own.
    if sys.platform == "linux":
        os.environ[VARIABLE] = environment_value(VARIABLE) or "lo"
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
    info = RankInfo(rank=0, world=world, local_rank=0, address=LOOPBACK, port=port, run_id="0", has_store=True)
    return info, dist.PrefixStore(f"lingbot_rt/{info.run_id}", server)


def start_workers(command: Sequence[str], info: RankInfo) -> dict[int, subprocess.Popen[bytes]]:
    """Starts a process of ``command`` for each of the ranks 1 .. P - 1. ``info`` is rank 0's."""
    processes = {}
    for rank in range(1, info.world):
        own = dataclasses.replace(info, rank=rank, local_rank=rank)
        processes[rank] = subprocess.Popen(command, env=os.environ | own.environment(), stdin=subprocess.DEVNULL)
    return processes


def stop_workers(processes: Mapping[int, subprocess.Popen[bytes]], *, grace_s: float) -> None:
    """Waits ``grace_s`` for the processes to exit, then kills those that are left."""
    deadline = time.monotonic() + grace_s
    for process in processes.values():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    for process in processes.values():
        process.wait()
