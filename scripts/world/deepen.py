"""Adds layers to a trained DiT without changing what it computes.

    python -m scripts.world.deepen --layers 12

The new blocks stand between the old ones, are copies of the block before them, and begin with output projections and
camera modulation of zero, so that they add nothing until they are trained.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from lingbot_rt.models.checkpoint import load_dit
from lingbot_rt.models.dit import CausalDiT, split_qkv
from scripts.world.config import FULL, WorldConfig
from scripts.world.make_latents import checkpoint
from scripts.world.training_loop import Options, save_part

_SILENT = ("self_attn.o", "cross_attn.o", "ffn.2", "cam_scale_layer", "cam_shift_layer")


def deepened(dit: CausalDiT, config: WorldConfig) -> CausalDiT:
    """A DiT of ``config``, which has more layers than ``dit`` and is alike in everything else."""
    new = CausalDiT(config.dit)
    old_layers, layers = dit.config.num_layers, config.dit.num_layers
    state = {name: value for name, value in dit.state_dict().items() if not name.startswith("blocks.")}
    taken = -1
    for layer in range(layers):
        of = (layer * old_layers) // layers
        part = {name: value.clone() for name, value in dit.blocks[of].state_dict().items()}  # type: ignore[attr-defined]
        if of == taken:
            for name in part:
                if name.startswith(_SILENT):
                    part[name].zero_()
        taken = of
        state |= {f"blocks.{layer}.{name}": value for name, value in part.items()}
    new.load_state_dict(state)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", dest="run", type=Path, default=Path("runs/world"))
    parser.add_argument("--layers", type=int, default=FULL.dit_layers)
    args = parser.parse_args()
    folder = args.run / "model" / "transformer"
    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_layers"]
    now, wanted = (replace(FULL, dit_layers=count) for count in (layers, args.layers))
    cpu = torch.device("cpu")
    dit = deepened(load_dit(checkpoint(Options(args.run, now, cpu)), torch.float32, cpu), wanted)
    save_part(folder, wanted.transformer, split_qkv(dit.state_dict()))


if __name__ == "__main__":
    main()
