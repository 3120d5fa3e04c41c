"""A worker that computes as the tests' own process does: ``python exact_worker.py CONFIG``.

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

LATE_CYCLES = 1_000_000
"""About half a millisecond."""

all_to_all = RankGroup.all_to_all


def late(*args) -> None:
    torch.cuda._sleep(LATE_CYCLES)
    all_to_all(*args)


if __name__ == "__main__":
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.deterministic = True
    StreamingVAE.compile = lambda self, backend="": None
    RankGroup.all_to_all = late
    sys.exit(worker.run_launched_worker(ServeConfig(**json.loads(sys.argv[1]))))
