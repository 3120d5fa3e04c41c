"""A worker that computes exactly: ``python exact_worker.py CONFIG``.

Its convolutions are exact, its VAE is not compiled, and it is late for every exchange.
"""

from __future__ import annotations

import json
import sys

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine import worker
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.peer_memory import PeerMemory

LATE_CYCLES = 1_000_000
"""About half a millisecond."""


def late(exchange):
    def exchanged_late(*args):
        torch.cuda._sleep(LATE_CYCLES)
        return exchange(*args)

    return exchanged_late


def use_exact_convolutions() -> None:
    """Without TF32, and always by the same kernels."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.deterministic = True
    StreamingVAE.compile = lambda self, backend="": None


if __name__ == "__main__":
    use_exact_convolutions()
    RankGroup.all_to_all = late(RankGroup.all_to_all)
    PeerMemory.place = late(PeerMemory.place)  # before q, k and v are written
    PeerMemory.push_rows = late(PeerMemory.push_rows)
    sys.exit(worker.run_launched_worker(ServeConfig(**json.loads(sys.argv[1]))))
