"""The model that ships with the package: the full architecture at a size that a CPU runs in real time.

Its configuration and tokenizer are package data. Its weights are procedural and untrained: the first start makes them
from a fixed seed and keeps them in a user cache as a checkpoint folder. The package loads it like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from lingbot_rt.models import procedural_world
from lingbot_rt.models.dit import CausalDiT, DiTConfig, split_qkv
from lingbot_rt.models.file_checks import broken

BUILTIN_CONFIGS = Path(__file__).parent.parent / "builtin"
"""The package data: a model folder without weights."""

_SEED = 20

CACHE_VARIABLE = "LINGBOT_RT_CACHE"


def cache_root() -> Path:
    """``$LINGBOT_RT_CACHE``, else ``$XDG_CACHE_HOME/lingbot_rt``, else ``~/.cache/lingbot_rt``.

    A variable that is empty counts as unset. Raises CheckpointError for a home folder that nobody knows.
    """
    own, shared = (os.environ.get(name, "").strip() for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"))
    try:
        if own:
            return Path(own).expanduser()
        # The XDG specification says to ignore a path that is not absolute.
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except RuntimeError:
        raise broken(
            f"this user has no home folder: name a folder for the built-in model in {CACHE_VARIABLE}"
        ) from None
    return base / "lingbot_rt"


def builtin_folder() -> Path:
    """The built-in checkpoint folder. It is made if it does not exist; several processes may call this at once.

    Raises CheckpointError when the cache cannot be written. Then nothing is left in it.
    """
    folder = cache_root() / f"builtin-{_key()}"
    made: list[Path] = []
    try:
        if not folder.exists():
            made = _make_parents(folder.parent)
            _make_once(folder)
    except OSError as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise broken(
            f"{folder.parent}, where the built-in model is kept: {error.strerror or error}: name a folder that can be "
            f"written, with 100 MB free, in {CACHE_VARIABLE}"
        ) from None
    return folder


def _make_parents(folder: Path) -> list[Path]:
    """Makes ``folder`` and its parents. Returns those that did not exist, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _make_once(folder: Path) -> None:
    """Makes the folder under another name, then renames it, so that nobody sees half of it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        _make(made)
        try:
            made.rename(folder)
        except OSError:
            # Another process was first; both made the same bytes.
            if not folder.exists():
                raise


def _package_files() -> list[Path]:
    """The configuration files. Names that begin with a dot are the system's own."""
    return [path for path in sorted(BUILTIN_CONFIGS.rglob("*.json")) if not path.name.startswith(".")]


def _key() -> str:
    """A hash of what the weights depend on: the configuration, the code that makes them, and torch's generator."""
    digest = hashlib.sha256(f"{_SEED} {torch.__version__}".encode())
    for path in (Path(__file__), Path(procedural_world.__file__), *_package_files()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _make(folder: Path) -> None:
    for source in _package_files():
        target = folder / source.relative_to(BUILTIN_CONFIGS)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Only the content: an installed package may be read-only, its copy must not be.
        shutil.copyfile(source, target)

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
    # Not save_file: for a full disk its error is one of safetensors and not of the system.
    path.write_bytes(save({name: value.contiguous() for name, value in state.items()}))
