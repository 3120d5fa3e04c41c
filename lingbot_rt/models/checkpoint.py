"""Loads the networks of a folder in diffusers' layout, a hub id or the built-in world, or gives them random weights.

A network is built on the meta device. Then its modules get their memory on the final device and their weights, one by
one. A block of the DiT that is quantized is quantized at once: at no time are there two copies of more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from lingbot_rt.errors import one_line
from lingbot_rt.hub_cache import snapshot_id
from lingbot_rt.models.dit import CausalDiT, DiTConfig, split_qkv
from lingbot_rt.models.dummy import HashTokenizer, RandomWeights
from lingbot_rt.models.file_checks import broken
from lingbot_rt.models.folder import PARTS, TOKENIZER, has_tokenizer, left_out, tokenizer_files
from lingbot_rt.models.folder_weights import FolderWeights, original_name
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
from lingbot_rt.models.model_path import DUMMY, local_folder, require_parts
from lingbot_rt.models.quantize import quantize_linears
from lingbot_rt.models.schedule import DistilledSchedule, find_schedule
from lingbot_rt.models.text_encoder import TextEncoder, Tokenizer
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.shapes import FrameSize

Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""


class Weights(Protocol):
    """Where the weights of one network come from."""

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Writes the values of the network's tensors, which are given by their names."""


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A model on disk. Its configurations are read and fit each other."""

    path: Path
    dit_config: DiTConfig
    schedule: DistilledSchedule
    default_size: FrameSize
    left_out: tuple[str, ...] = ()  # files and networks in the folder that are not loaded
    is_dummy: bool = False  # random weights: none of its weight files is read


def open_checkpoint(model_path: str, schedule: str = "auto", load_format: str = "auto") -> CheckpointFolder:
    """Reads the configurations of ``builtin``, a folder or a hub id. A hub id is downloaded once, and can resume.

    ``schedule``: ``v1``, ``v2``, or ``auto`` for the model's own; see ``find_schedule``. ``load_format``: ``auto``, or
    ``dummy`` for random weights, which also takes a name of PUBLISHED and needs no files but the configurations.
    Raises CheckpointError, naming the file that is missing, unreadable or does not fit, and what to do.
    """
    dummy = load_format == DUMMY
    path = _find(model_path, dummy=dummy)
    require_parts(path, dummy=dummy)
    index = read_model_index(path / "model_index.json")
    dit_config = read_dit_config(path / "transformer" / "config.json")
    vae_config = read_vae_config(path / "vae" / "config.json")
    require_fit(path, dit_config, vae_config, read_text_config(path / "text_encoder" / "config.json"))
    return CheckpointFolder(
        path=path,
        dit_config=dit_config,
        schedule=find_schedule(path, _names(model_path, path), schedule),
        default_size=read_default_size(index),
        left_out=() if dummy else (*left_out(path), *other_components(index, PARTS)),
        is_dummy=dummy,
    )


def empty_dit(folder: CheckpointFolder) -> CausalDiT:
    """The DiT on the meta device."""
    with torch.device("meta"):
        return CausalDiT(folder.dit_config)


def empty_vae(folder: CheckpointFolder) -> Any:
    """diffusers' VAE on the meta device. Raises CheckpointError."""
    path = folder.path / "vae" / "config.json"
    config = read_vae_config(path)
    with torch.device("meta"), _library_errors(path):
        return AutoencoderKLWan(**config)


def empty_text_encoder(folder: CheckpointFolder) -> UMT5EncoderModel:
    """UMT5's encoder on the meta device. Raises CheckpointError."""
    config = read_text_config(folder.path / "text_encoder" / "config.json")
    with torch.device("meta"), _library_errors(config.path):
        return UMT5EncoderModel(UMT5Config.from_dict(dict(config.values)))


def load_dit(
    folder: CheckpointFolder,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    quantization: str = "none",
) -> CausalDiT:
    """The DiT, with q, k and v of self-attention in one fused linear. Raises CheckpointError.

    ``quantization``: as ``--quantization``. With ``fp8`` raises ConfigError for a model that fp8 kernels do not take.
    """
    dit, path = empty_dit(folder), folder.path / "transformer"
    weights: Weights
    if folder.is_dummy:
        weights = RandomWeights(device)
    else:
        weights = _SplitQKV(FolderWeights(split_qkv(dit.state_dict()), path, original_name))
    _materialize(dit, weights, partial(_allocate, dit, dtype, device, path), progress, quantize=quantization == "fp8")
    return _ready(dit)


def load_vae(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> StreamingVAE:
    """The VAE. Raises CheckpointError."""
    vae, path = empty_vae(folder), folder.path / "vae"
    weights: Weights = RandomWeights(device) if folder.is_dummy else FolderWeights(vae.state_dict(), path)
    _materialize(vae, weights, partial(_allocate, vae, dtype, device, path), progress)
    return StreamingVAE(_ready(vae))


def load_text_encoder(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> TextEncoder:
    """UMT5's encoder and its tokenizer. Raises CheckpointError."""
    encoder, path = empty_text_encoder(folder), folder.path / "text_encoder"
    vocab_size = encoder.config.vocab_size
    tokenizer: Tokenizer
    if folder.is_dummy and not has_tokenizer(folder.path):
        tokenizer = HashTokenizer(vocab_size)
    else:
        tokenizer = _tokenizer(folder.path, vocab_size)
    # One table with two names. A checkpoint has it under either name; the first is read if it has both.
    shared, alias = "shared.weight", "encoder.embed_tokens.weight"
    weights: Weights
    if folder.is_dummy:
        weights = RandomWeights(device)
    else:
        targets = {name: tensor for name, tensor in encoder.state_dict().items() if name != alias}
        weights = FolderWeights(targets, path, lambda name: shared if name == alias else name, {alias: shared})
    encoder.encoder.embed_tokens = encoder.shared
    _materialize(encoder, weights, partial(_allocate, encoder, dtype, device, path), progress)
    return TextEncoder(tokenizer, _ready(encoder), folder.dit_config.text_len)


def _find(model_path: str, *, dummy: bool) -> Path:
    """The folder that ``model_path`` names. Raises CheckpointError."""
    return local_folder(model_path, dummy=dummy) or fetch(model_path, weights=not dummy)


def _names(model_path: str, path: Path) -> list[str]:
    """What the model in ``path`` is called, the best name first: its hub id, else the path, then its folder."""
    return [snapshot_id(path.resolve()) or model_path, path.resolve().name]


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


class _SplitQKV:
    """Weights under the original checkpoint's names for a network with a fused qkv."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        self._weights.fill(split_qkv(dict(targets)))


def _materialize(
    network: nn.Module,
    weights: Weights,
    allocate: Callable[[Tensor], Tensor],
    progress: Progress | None,
    *,
    quantize: bool = False,
) -> None:
    """Gives each parameter of a network of the meta device its memory and its value, module by module.

    ``quantize``: the linears of the DiT's blocks, of each block as soon as it is filled.
    """
    names = [name for name, module in network.named_modules() if module._parameters]
    done = 0
    for block, members in groupby(names, _block_of):
        for name in members:
            _fill(network, name, weights, allocate)
            done += 1
            if progress is not None:
                progress(done / len(names))
        if quantize and block:
            quantize_linears(network.get_submodule(block))


def _block_of(name: str) -> str:
    """``blocks.3.ffn.0`` -> ``blocks.3``; empty for a module outside the DiT's blocks."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""


def _fill(network: nn.Module, name: str, weights: Weights, allocate: Callable[[Tensor], Tensor]) -> None:
    """Memory and values for the parameters of the network's module ``name``, without those of its children."""
    module = network.get_submodule(name)
    own = {key: allocate(value) for key, value in module._parameters.items() if value is not None}
    weights.fill({f"{name}.{key}" if name else key: tensor for key, tensor in own.items()})
    for key, tensor in own.items():
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))


def _allocate(network: nn.Module, dtype: torch.dtype, device: torch.device, folder: Path, value: Tensor) -> Tensor:
    """Memory for one parameter of a network. Raises CheckpointError."""
    try:
        return torch.empty_like(value, dtype=dtype, device=device)
    except (RuntimeError, MemoryError):
        # torch has no error of its own for a CPU without memory, and nothing else can fail here.
        gigabytes = sum(value.numel() for value in network.state_dict().values()) * dtype.itemsize / 1e9
        raise broken(
            f"{folder}: its weights take {gigabytes:.1f} GB, more than {device} has free: free some, or use a smaller "
            "--dtype or one of the offload options"
        ) from None


def _ready(network: Any) -> Any:
    """The network for inference, all of whose tensors have to have values."""
    unfilled = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    assert not unfilled, f"tensors that no checkpoint file has: {unfilled}"
    return network.requires_grad_(False).eval()
