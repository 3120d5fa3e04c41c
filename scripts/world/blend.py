"""Weighted sums of trained DiTs: a compromise between trainings, or the step from one to another made longer.

    python -m scripts.world.blend 0.5 lingbot_rt/builtin 0.9 runs/sharp -0.4 runs/rollout

This writes transformer/ of the run's model/. The networks must have one origin: those of separate trainings do not add
up. The weights add up to 1. A negative one goes away from its network: 2 of one after a stage and -1 of the one before
it double what the stage changed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lingbot_rt.errors import CheckpointError
from lingbot_rt.models.checkpoint import load_dit, open_checkpoint
from lingbot_rt.models.dit import split_qkv
from scripts.world.config import CONFIGS
from scripts.world.export import complete
from scripts.world.training_loop import save_part


def blend(weights: Sequence[float], states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of ``states``, which have the same names and shapes.

    Raises ValueError if the weights do not add up to 1.
    """
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"the weights add up to {sum(weights):g}, not to 1")
    return {
        name: sum((weight * state[name] for weight, state in zip(weights, states, strict=True)), torch.zeros(()))
        for name in states[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("terms", nargs="+", metavar="WEIGHT FOLDER", help="of each network: its weight and checkpoint")
    parser.add_argument("--run-folder", dest="run", type=Path, default=Path("runs/world"), help="where model/ is")
    parser.add_argument("--config", choices=CONFIGS, default="full")
    args = parser.parse_args()
    config, model = CONFIGS[args.config], args.run / "model"
    if len(args.terms) % 2:
        parser.error(f"{args.terms[-1]} has no folder: each network needs a weight and a folder")
    try:
        weights = [float(text) for text in args.terms[::2]]
        folders = [open_checkpoint(path) for path in args.terms[1::2]]
        for folder in folders:
            if folder.dit_config != config.dit:
                raise ValueError(f"{folder.path} has other layers or channels than --config {args.config}")
        states = [load_dit(folder, torch.float32, torch.device("cpu")).state_dict() for folder in folders]
        state = blend(weights, states)
    except (ValueError, CheckpointError) as error:
        parser.error(str(error))
    save_part(model / "transformer", config.transformer, split_qkv(state))
    complete(model, config)


if __name__ == "__main__":
    main()
