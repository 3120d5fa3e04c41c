"""Loads the networks of a folder in diffusers' layout, a hub id or the built-in world.

The names, shapes and types in the headers of the weight files are compared with the network before any weight is read.
A network is built on the meta device. Its memory is allocated once, on its final device, and each tensor of the
safetensors files is copied into it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from lingbot_rt.config import BUILTIN
from lingbot_rt.errors import CheckpointError, one_line
from lingbot_rt.hub_cache import newest_snapshot, repository_id, snapshot_id
from lingbot_rt.models.builtin import builtin_folder
from lingbot_rt.models.dit import CausalDiT, DiTConfig, split_qkv
from lingbot_rt.models.file_checks import broken, listed, require_file, shorten, system_error
from lingbot_rt.models.folder import PARTS, TOKENIZER, WeightFiles, left_out, tokenizer_files, weight_files
from lingbot_rt.models.hub import fetch
from lingbot_rt.models.model_config import (
    other_components,
    read_default_size,
    read_dit_config,
    read_model_index,
    read_text_config,
    read_vae_config,
    require_fit,
)
from lingbot_rt.models.schedule import DistilledSchedule, find_schedule
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.shapes import FrameSize

Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types of tensors that weights are copied from. Whole numbers are quantized weights, which need more than a copy."""

_DIFFUSERS_NAMES = [
    (r"condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.attn1\.(norm_[qk])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.(norm_[qk])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"scale_shift_table$", "head.modulation"),
    (r"proj_out\.", "head.head."),
]
"""diffusers' parameter names -> the original checkpoint's."""


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A model on disk. Its configurations are read and fit each other."""

    path: Path
    dit_config: DiTConfig
    schedule: DistilledSchedule
    default_size: FrameSize
    left_out: tuple[str, ...] = ()  # files and networks in the folder that are not loaded


def open_checkpoint(model_path: str, schedule: str = "auto") -> CheckpointFolder:
    """Reads the configurations of ``builtin``, a folder or a hub id. A hub id is downloaded once, and can resume.

    ``schedule``: ``v1``, ``v2``, or ``auto`` for the model's own; see ``find_schedule``.
    Raises CheckpointError, naming the file that is missing, unreadable or does not fit, and what to do.
    """
    path = _find(model_path)
    for part in PARTS:
        try:
            os.listdir(path / part)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_model(path) from None
        except OSError as error:
            raise system_error(path / part, error) from None
    index = read_model_index(path / "model_index.json")
    dit_config = read_dit_config(path / "transformer" / "config.json")
    vae_config = read_vae_config(path / "vae" / "config.json")
    require_fit(path, dit_config, vae_config, read_text_config(path / "text_encoder" / "config.json"))
    return CheckpointFolder(
        path=path,
        dit_config=dit_config,
        schedule=find_schedule(path, _names(model_path, path), schedule),
        default_size=read_default_size(index),
        left_out=(*left_out(path), *other_components(index, PARTS)),
    )


def load_dit(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> CausalDiT:
    """The DiT, with q, k and v of self-attention in one fused linear. Raises CheckpointError."""
    with torch.device("meta"):
        dit = CausalDiT(folder.dit_config)
    copies = _match(split_qkv(dit.state_dict()), folder.path / "transformer", _original_name)
    state = _allocate(dit, dtype, device, folder.path / "transformer")
    _fill(split_qkv(state), copies, progress)
    return _assign(dit, state)


def load_vae(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> StreamingVAE:
    """The VAE. Raises CheckpointError."""
    path = folder.path / "vae"
    config = read_vae_config(path / "config.json")
    with torch.device("meta"), _library_errors(path / "config.json"):
        vae = AutoencoderKLWan(**config)
    copies = _match(vae.state_dict(), path, lambda name: name)
    state = _allocate(vae, dtype, device, path)
    _fill(state, copies, progress)
    return StreamingVAE(_assign(vae, state))


def load_text_encoder(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> TextEncoder:
    """UMT5's encoder and its tokenizer. Raises CheckpointError."""
    path = folder.path / "text_encoder"
    config = read_text_config(path / "config.json")
    with torch.device("meta"), _library_errors(config.path):
        encoder = UMT5EncoderModel(UMT5Config.from_dict(dict(config.values)))
    tokenizer = _tokenizer(folder.path, encoder.config.vocab_size)
    # One table with two names. A checkpoint has it under either name; the first is read if it has both.
    shared, alias = "shared.weight", "encoder.embed_tokens.weight"
    targets = {name: tensor for name, tensor in encoder.state_dict().items() if name != alias}
    copies = _match(targets, path, lambda name: shared if name == alias else name, aliases={alias: shared})
    state = _allocate(encoder, dtype, device, path)
    state[alias] = state[shared]
    _fill(state, copies, progress)
    encoder = _assign(encoder, state)
    encoder.tie_weights()
    return TextEncoder(tokenizer, encoder, folder.dit_config.text_len)


def _find(model_path: str) -> Path:
    """The folder that ``model_path`` names. Raises CheckpointError."""
    if model_path == BUILTIN:
        return builtin_folder()
    if not model_path.strip():
        raise broken("--model-path is empty: name builtin, a folder or a hub id")
    path = Path(os.path.expanduser(model_path))
    try:
        os.listdir(path)
    except FileNotFoundError:
        # A hub id has one slash at most, and no part of it begins like a path.
        if path.is_absolute() or model_path.startswith(("./", "../", "~")) or model_path.count("/") > 1:
            shown = path if model_path.startswith("~") else model_path
            raise broken(f"--model-path {shown}: there is no such folder, and a hub id is OWNER/NAME") from None
        return fetch(model_path)
    except NotADirectoryError:
        raise broken(f"--model-path {path} is a file, expected the folder of a model") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise broken(f"--model-path {shorten(str(path))}: {reason}") from None
    return path


def _names(model_path: str, path: Path) -> list[str]:
    """What the model in ``path`` is called, the best name first: its hub id, else the path, then its folder."""
    return [snapshot_id(path.resolve()) or model_path, path.resolve().name]


def _no_model(path: Path) -> CheckpointError:
    """The error for a folder without the parts of a model. It names the folder that was meant, if there is one."""
    repository = path.parent if path.name == "snapshots" else path
    model_id = repository_id(repository)
    try:
        if model_id is not None and (repository / "snapshots").is_dir():
            snapshot = newest_snapshot(repository)
            name = f"{snapshot}, or the id {model_id}" if snapshot else f"one of the folders in {repository}/snapshots"
            return broken(f"{path} is the hub cache's folder of {model_id}, not a model: name {name}")
        inside = [child for child in sorted(path.iterdir()) if all((child / part).is_dir() for part in PARTS)]
        cached = sorted(filter(None, map(repository_id, (*path.glob("models--*"), *path.glob("hub/models--*")))))
        if cached:
            return broken(f"{path} is a cache of the hub, not a model: name the id of one, of {listed(cached)}")
    except OSError as error:
        return system_error(path, error)
    missing = ", ".join(f"{part}/" for part in PARTS if not (path / part).is_dir())
    remedy = f"name {inside[0]}" if len(inside) == 1 else "name a folder that has them, or fetch the model again"
    return broken(f"{path} is not a diffusers model folder: it has no {missing}: {remedy}")


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turns any error of diffusers or transformers, which raise every kind, into one that names the file."""
    try:
        yield
    except Exception as error:
        raise broken(f"{path} does not describe a network that can be built: {one_line(error)}") from None


def _tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the model folder ``path``, whose ids are all below ``vocab_size``. Raises CheckpointError."""
    files = tokenizer_files(path)
    names = ", ".join(file.name for file in files)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path / TOKENIZER, local_files_only=True, trust_remote_code=False)
        # Some settings of a wrong type are noticed by the first prompt only.
        tokenizer("a prompt", truncation=True, max_length=8)
    except Exception as error:
        # The tokenizers library raises plain Exception.
        raise broken(f"{path / TOKENIZER} does not load from {names}: {one_line(error)}: fetch it again") from None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= highest < vocab_size:
        raise broken(
            f"{path / TOKENIZER} has ids up to {highest}, text_encoder/config.json has a vocab_size of {vocab_size}: "
            "fetch both again"
        )
    return tokenizer


def _allocate(module: nn.Module, dtype: torch.dtype, device: torch.device, folder: Path) -> dict[str, Tensor]:
    """Allocates every parameter of a module that was built on the meta device. Raises CheckpointError."""
    values = module.state_dict()
    try:
        return {name: torch.empty_like(value, dtype=dtype, device=device) for name, value in values.items()}
    except (RuntimeError, MemoryError):
        # torch has no error of its own for a CPU without memory, and nothing else can fail here.
        gigabytes = sum(value.numel() for value in values.values()) * dtype.itemsize / 1e9
        raise broken(
            f"{folder}: its weights take {gigabytes:.1f} GB, more than {device} has free: free some, or use a smaller "
            "--dtype or one of the offload options"
        ) from None


def _assign(module: Any, state: dict[str, Tensor]) -> Any:
    """Makes the tensors of ``state`` the module's own, without a copy."""
    module.load_state_dict(state, assign=True)
    unfilled = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unfilled, f"tensors that no checkpoint file has: {unfilled}"
    return module.requires_grad_(False).eval()


def _original_name(name: str) -> str:
    for pattern, replacement in _DIFFUSERS_NAMES:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


@dataclass(frozen=True, slots=True)
class _Copy:
    """One tensor of a file, and the tensor of the network that gets its values."""

    path: Path
    name: str
    target: str


def _match(
    targets: dict[str, Tensor], folder: Path, rename: Callable[[str], str], aliases: dict[str, str] | None = None
) -> list[_Copy]:
    """Which tensor of which file each target gets. Only headers are read.

    ``aliases``: names that are passed over if the files also have the other name. Raises CheckpointError unless every
    target has one tensor of its shape, and every tensor is for a target.
    """
    files = weight_files(folder)
    found: dict[str, Path] = {}
    headers: dict[str, tuple[list[int], str]] = {}
    for path in files.paths:
        with _open_weights(path) as file:
            for name in list(file.keys()):
                if name in found:
                    raise broken(f"{path} and {found[name].name} both have {shorten(name)}: fetch the model again")
                found[name] = path
                header = file.get_slice(name)
                headers[name] = (header.get_shape(), header.get_dtype())
    _require_listed(files, found)
    copies: dict[str, _Copy] = {}
    extra, misshapen = [], []
    for name, (shape, dtype) in headers.items():
        if aliases and aliases.get(name) in headers:
            continue
        target = rename(name)
        if target not in targets:
            extra.append(name)
        elif target in copies:
            raise broken(
                f"{found[name]}: {shorten(name)} and {shorten(copies[target].name)} are the same tensor of the network:"
                " remove one"
            )
        else:
            copies[target] = _Copy(found[name], name, target)
            if list(targets[target].shape) != shape:
                misshapen.append(f"{name} {shape} for {list(targets[target].shape)}")
            elif dtype not in _FLOATS:
                misshapen.append(f"{name} of type {dtype}")
    problems = (("missing", sorted(targets.keys() - copies)), ("unexpected", extra), ("misshapen", misshapen))
    parts = [f"{len(names)} {what}: {listed(names)}" for what, names in problems if names]
    if parts:
        raise broken(f"{folder} does not fit its config.json: {'; '.join(parts)}; fetch both of the same model")
    return list(copies.values())


def _require_listed(files: WeightFiles, found: dict[str, Path]) -> None:
    """Raises CheckpointError unless the index, if there is one, lists each tensor under the file that has it."""
    if files.weight_map is None:
        return
    wrong = [name for name, shard in files.weight_map.items() if name not in found or found[name].name != shard]
    wrong += [name for name in found if name not in files.weight_map]
    if wrong:
        raise broken(
            f"{files.index} does not fit its files: {len(wrong)} tensors are in another file than it says, or in none: "
            f"{listed(wrong)}; fetch the index and the weights again"
        )


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises CheckpointError, also for what goes wrong while it is read."""
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise broken(f"{path} is incomplete or damaged ({error}): fetch it again") from None
    except OSError as error:
        raise system_error(path, error) from None


def _fill(targets: dict[str, Tensor], copies: list[_Copy], progress: Progress | None) -> None:
    """Copies the tensors into the targets, one at a time in memory."""
    paths = list(dict.fromkeys(copy.path for copy in copies))
    done = 0
    for path in paths:
        with _open_weights(path) as file:
            for copy in copies:
                if copy.path == path:
                    targets[copy.target].copy_(file.get_tensor(copy.name))
                    done += 1
                    if progress is not None:
                        progress(done / len(copies))
