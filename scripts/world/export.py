"""Stage 8: copies a run's model/ to a checkpoint folder to ship, after checking that it loads and its size.

    python -m scripts.world.export --to lingbot_rt/builtin

The training stages have written all networks in float16 already.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from scripts.world.config import CONFIGS, WorldConfig

MAX_FILE_BYTES = 16_000_000
MAX_BYTES = 48_000_000
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


def complete(model: Path, config: WorldConfig) -> None:
    """Writes model_index.json and scheduler/ beside the networks, then loads every network as serving does.

    Raises CheckpointError if one does not load.
    """
    index = {
        "_class_name": "LingBotWorldCausalDMDPipeline",
        "default_size": str(config.size),
        "scheduler": ["diffusers", "SelfForcingFlowMatchScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "CausalLingBotWorldTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    for path, content in (
        (model / "model_index.json", index),
        (model / "scheduler" / "scheduler_config.json", config.scheduler),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    folder = open_checkpoint(str(model))
    for load in (load_dit, load_vae, load_text_encoder):
        load(folder, torch.float32, torch.device("cpu"))


def export(model: Path, config: WorldConfig, to: Path) -> int:
    """Copies ``model`` to ``to`` and returns the bytes written. Raises ValueError if it is too large."""
    complete(model, config)
    files = [path for path in sorted(model.rglob("*")) if path.is_file()]
    large = [f"{path.name}: {path.stat().st_size}" for path in files if path.stat().st_size > MAX_FILE_BYTES]
    total = sum(path.stat().st_size for path in files)
    if large or total > MAX_BYTES:
        raise ValueError(f"{total} bytes of {MAX_BYTES} in all; over {MAX_FILE_BYTES} in one file: {large or 'none'}")
    for part in (*PARTS, "scheduler"):
        shutil.rmtree(to / part, ignore_errors=True)
    # Content only: safetensors makes files that nobody but their owner may read.
    shutil.copytree(model, to, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", dest="run", type=Path, default=Path("runs/world"))
    parser.add_argument("--config", choices=CONFIGS, default="full")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write; parts that exist are replaced")
    args = parser.parse_args()
    total = export(args.run / "model", CONFIGS[args.config], args.to)
    print(f"{args.to}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
