"""A worker with a fault: ``python broken_worker.py FAULT RANK CONFIG``. Only rank RANK has it."""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine import memory, worker
from lingbot_rt.errors import CheckpointError


def raise_in_chunk(*args):
    raise ValueError("the kernel said no\nsecond line")


def stall_in_chunk(*args):
    time.sleep(600)


def no_memory_in_exchange(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def first_full_then_free(pipeline):
    memory._own_free_bytes = own_free_bytes
    return 0


own_free_bytes = memory._own_free_bytes


def fail_to_load(*args):
    raise CheckpointError("a shard is damaged")


if __name__ == "__main__":
    fault, rank, config = sys.argv[1:]
    if os.environ["RANK"] == rank:
        match fault:
            case "raise":
                worker.run_chunk = raise_in_chunk
            case "stall":
                worker.run_chunk = stall_in_chunk
            case "memory":
                dist.all_to_all_single = no_memory_in_exchange
            case "full":
                memory._own_free_bytes = first_full_then_free
            case "load":
                worker.load_pipeline = fail_to_load
    sys.exit(worker.run_launched_worker(ServeConfig(**json.loads(config))))
