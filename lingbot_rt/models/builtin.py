"""The model that ships with the package: the full architecture at a size that a CPU runs in real time.

Its configuration and tokenizer are package data. Its weights are procedural and untrained: the first start makes them
from a fixed seed and keeps them in a user cache as a checkpoint folder. The package loads it like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from lingbot_rt.models import procedural_world
from lingbot_rt.models.dit import CausalDiT, DiTConfig, split_qkv

_SOURCE = Path(__file__).parent.parent / "builtin"
_SEED = 20


def cache_root() -> Path:
    """``$LINGBOT_RT_CACHE``, else ``$XDG_CACHE_HOME/lingbot_rt``, else ``~/.cache/lingbot_rt``."""
    if "LINGBOT_RT_CACHE" in os.environ:
        return Path(os.environ["LINGBOT_RT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lingbot_rt"


def builtin_folder() -> Path:
    """The built-in checkpoint folder. It is made if it does not exist; several processes may call this at once."""
    folder = cache_root() / f"builtin-{_key()}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            _make(made)
            try:
                made.rename(folder)
            except OSError:
                # Another process was first; both made the same bytes.
                if not folder.exists():
                    raise
    return folder


def _key() -> str:
    """A hash of what the weights depend on: the configuration, the code that makes them, and torch's generator."""
    digest = hashlib.sha256(f"{_SEED} {torch.__version__}".encode())
    for path in (Path(__file__), Path(procedural_world.__file__), *sorted(_SOURCE.rglob("*.json"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _make(folder: Path) -> None:
    shutil.copytree(_SOURCE, folder)

    def config(part: str) -> dict:
        return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))

    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(_SEED)
        dit = CausalDiT(DiTConfig.from_dict(config("transformer")))
        procedural_world.init_dit(dit)
        vae = AutoencoderKLWan.from_config(config("vae"))
        procedural_world.init_vae(vae)
        text_encoder = UMT5EncoderModel(UMT5Config.from_dict(config("text_encoder")))
        _save(split_qkv(dit.state_dict()), folder / "transformer" / "diffusion_pytorch_model.safetensors")
        _save(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
        text = text_encoder.state_dict()
        del text["encoder.embed_tokens.weight"]  # the same table as shared.weight
        _save(text, folder / "text_encoder" / "model.safetensors")


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
