"""A diffusers-layout folder, a hub id or the built-in world -> the networks, on their device in one copy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from lingbot_rt.config import BUILTIN
from lingbot_rt.errors import CheckpointError
from lingbot_rt.models.builtin import builtin_folder
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.shapes import FrameSize

Progress = Callable[[float], None]

DISTILLED_SHIFT = 10.0
DISTILLED_STEPS = (1000, 821, 642, 321)
TRAINED_SIZE = FrameSize(832, 480)

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
_LISTED_KEYS = 8

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
"""diffusers' names of the same parameters -> the original checkpoint's."""


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A model on disk, its small files read."""

    path: Path
    dit_config: DiTConfig
    shift: float  # of the flow-matching schedule
    denoise_steps: tuple[int, ...]  # the distilled timesteps, unwarped
    default_size: FrameSize


def open_checkpoint(model_path: str) -> CheckpointFolder:
    """``builtin``, a folder, or a hub id (fetched once, resumable). Raises CheckpointError saying what is missing."""
    if model_path == BUILTIN:
        path = builtin_folder()
    elif Path(model_path).is_dir():
        path = Path(model_path)
    else:
        path = _fetch(model_path)
    missing = [part for part in _PARTS if not (path / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{path} is not a diffusers model folder: it lacks {', '.join(part + '/' for part in missing)}",
            field="model_path",
        )
    index = _read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(scheduler_file) if scheduler_file.exists() else {}
    try:
        size = FrameSize.parse(index["default_size"]) if "default_size" in index else TRAINED_SIZE
        return CheckpointFolder(
            path=path,
            dit_config=DiTConfig.load(path / "transformer" / "config.json"),
            shift=float(scheduler.get("shift", DISTILLED_SHIFT)),
            denoise_steps=tuple(int(step) for step in scheduler.get("dmd_denoising_steps", DISTILLED_STEPS)),
            default_size=size,
        )
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}", field="model_path") from None


def load_dit(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> CausalDiT:
    """The DiT's weights, converted shard by shard; q, k and v of self-attention land in one fused linear."""
    with torch.device("meta"):
        dit = CausalDiT(folder.dit_config)
    state = {name: torch.empty_like(value, dtype=dtype, device=device) for name, value in dit.state_dict().items()}
    targets = _dit_targets(state)
    _fill(targets, folder.path / "transformer", _original_name, progress)
    dit.load_state_dict(state, assign=True)
    return dit.requires_grad_(False).eval()


def load_vae(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> StreamingVAE:
    config = _read_json(folder.path / "vae" / "config.json")
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    state = {name: torch.empty_like(value, dtype=dtype, device=device) for name, value in vae.state_dict().items()}
    _fill(state, folder.path / "vae", lambda name: name, progress)
    vae.load_state_dict(state, assign=True)
    return StreamingVAE(vae)


def load_text_encoder(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> TextEncoder:
    """UMT5 and its tokenizer, loaded by transformers from the folder alone."""
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        encoder, info = UMT5EncoderModel.from_pretrained(
            folder.path / "text_encoder", dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder.path}: text encoder: {first_line}", field="model_path") from None
    _refuse(folder.path / "text_encoder", info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if progress is not None:
        progress(1.0)
    return TextEncoder(tokenizer, encoder.to(device), folder.dit_config.text_len)


def _fetch(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id))
    except HFValidationError:
        raise CheckpointError(
            f"--model-path {model_id}: neither a folder that exists nor a hub id", field="model_path"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"--model-path {model_id}: no such folder, and the hub did not give it ({reason}); "
            f"put its files in a folder and name that, for example --model-path ./models/{Path(model_id).name}",
            field="model_path",
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", field="model_path") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", field="model_path") from None


def _original_name(name: str) -> str:
    for pattern, replacement in _DIFFUSERS_NAMES:
        name, count = re.subn("^" + pattern, replacement, name)
        if count:
            break
    return name


def _dit_targets(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint name -> the tensor (or the rows of a fused one) that it fills."""
    targets = {}
    for name, tensor in state.items():
        if ".self_attn.qkv." in name:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                targets[name.replace(".qkv.", f".{letter}.")] = rows
        else:
            targets[name] = tensor
    return targets


def _fill(targets: dict[str, Tensor], folder: Path, rename: Callable[[str], str], progress: Progress | None) -> None:
    """Copies every tensor of the folder's safetensors files into its target; anything that does not fit is an error."""
    missing, extra, misshapen = set(targets), [], []
    for done, name, tensor in _tensors(folder):
        target = targets.get(rename(name))
        if target is None:
            extra.append(name)
        elif target.shape != tensor.shape:
            misshapen.append(f"{name} {list(tensor.shape)} for {list(target.shape)}")
            missing.discard(rename(name))
        else:
            target.copy_(tensor)
            missing.discard(rename(name))
        if progress is not None:
            progress(done)
    _refuse(folder, missing, extra, misshapen)


def _tensors(folder: Path) -> Iterator[tuple[float, str, Tensor]]:
    """(share done, name, tensor) of every tensor in the folder, one in memory at a time."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file", field="model_path")
    for number, path in enumerate(files):
        try:
            with safe_open(path, framework="pt") as shard:
                names = list(shard.keys())
                for i, name in enumerate(names):
                    yield (number + (i + 1) / len(names)) / len(files), name, shard.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}", field="model_path") from None


def _refuse(folder: Path, missing: Any, extra: Any, misshapen: Any) -> None:
    """Raises CheckpointError that lists what does not fit, if anything."""
    parts = []
    for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen)):
        names = sorted(map(str, names))
        if names:
            more = f" and {len(names) - _LISTED_KEYS} more" if len(names) > _LISTED_KEYS else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:_LISTED_KEYS])}{more}")
    if parts:
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(parts)}", field="model_path")
