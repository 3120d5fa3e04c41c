"""The model that ships with the package: the real architecture at tiny size, so that a plain CPU runs it in real time.

Its configuration and tokenizer are package data. Its weights are drawn from a fixed seed at first start and kept in a
user cache as an ordinary checkpoint folder, which every other part of the package loads like any other.
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
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from lingbot_rt.models.dit import CausalDiT, DiTConfig

_SOURCE = Path(__file__).parent.parent / "builtin"
_SEED = 20
_RECIPE = 1
"""Goes up with every change of how the weights are drawn: it is part of the cache key."""


def cache_root() -> Path:
    """``$LINGBOT_RT_CACHE``, else ``$XDG_CACHE_HOME/lingbot_rt``, else ``~/.cache/lingbot_rt``."""
    if "LINGBOT_RT_CACHE" in os.environ:
        return Path(os.environ["LINGBOT_RT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lingbot_rt"


def builtin_folder() -> Path:
    """The built-in checkpoint folder, made when it is not there. Safe when several processes start at once."""
    folder = cache_root() / f"builtin-{_key()}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            _make(made)
            try:
                made.rename(folder)
            except OSError:
                # Another process was first; both drew the same bytes.
                if not folder.exists():
                    raise
    return folder


def _key() -> str:
    digest = hashlib.sha256(f"{_RECIPE} {_SEED} {torch.__version__}".encode())
    for path in sorted(_SOURCE.rglob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _make(folder: Path) -> None:
    shutil.copytree(_SOURCE, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        dit = CausalDiT(DiTConfig.from_dict(json.loads((folder / "transformer" / "config.json").read_text())))
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
        text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(folder / "text_encoder"))
        _draw_dit(dit)
    _save(_unfused(dit.state_dict()), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    _save(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    text_encoder.save_pretrained(folder / "text_encoder")


@torch.no_grad()
def _draw_dit(dit: nn.Module) -> None:
    """Small tables and a strong head, so that prompt, keys and noise all show in the picture."""
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(0, 0.2)


def _unfused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names of the original checkpoint: q, k and v of self-attention apart."""
    names = {}
    for name, value in state.items():
        if ".qkv." in name:
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                names[name.replace(".qkv.", f".{letter}.")] = rows
        else:
            names[name] = value
    return names


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
