"""Loads the networks of a folder in diffusers' layout, a hub id or the built-in world.

A network is built on the meta device. Its memory is allocated once, on its final device, and each tensor of the
safetensors files is copied into it. Names and shapes that do not fit are listed in one error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from lingbot_rt.config import BUILTIN
from lingbot_rt.errors import CheckpointError, one_line
from lingbot_rt.models.builtin import builtin_folder
from lingbot_rt.models.dit import CausalDiT, DiTConfig, split_qkv
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.text_encoder import TextEncoder
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.shapes import FrameSize

Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""

DISTILLED_SHIFT = 10.0
DISTILLED_STEPS = (1000, 821, 642, 321)
TRAINED_SIZE = FrameSize(832, 480)
WAN_Z_DIM = 16

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
_HUB_FILES = ["*.json", *(f"{part}/*" for part in _PARTS), "scheduler/*"]
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
"""diffusers' parameter names -> the original checkpoint's."""


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A model on disk. Its configurations are read and fit each other."""

    path: Path
    dit_config: DiTConfig
    shift: float  # of the flow-matching schedule
    denoise_steps: tuple[int, ...]  # the distilled timesteps before the shift
    default_size: FrameSize


def open_checkpoint(model_path: str) -> CheckpointFolder:
    """Reads the configurations of ``builtin``, a folder or a hub id. A hub id is downloaded once, and can resume.

    Raises CheckpointError, naming what is missing or does not fit.
    """
    if model_path == BUILTIN:
        path = builtin_folder()
    elif Path(model_path).is_dir():
        path = Path(model_path)
    else:
        path = _fetch(model_path)
    missing = [part for part in _PARTS if not (path / part).is_dir()]
    if missing:
        raise _broken(f"{path} is not a diffusers model folder: it has no {', '.join(part + '/' for part in missing)}")
    index = _read_json(path / "model_index.json", default={})
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json", default={})
    vae, text = (_read_json(path / part / "config.json") for part in ("vae", "text_encoder"))
    try:
        folder = CheckpointFolder(
            path=path,
            dit_config=DiTConfig.from_dict(_read_json(path / "transformer" / "config.json")),
            shift=float(scheduler.get("shift", DISTILLED_SHIFT)),
            denoise_steps=tuple(int(step) for step in scheduler.get("dmd_denoising_steps", DISTILLED_STEPS)),
            default_size=FrameSize.parse(index["default_size"]) if "default_size" in index else TRAINED_SIZE,
        )
    except (ValueError, TypeError) as error:
        raise _broken(f"{path}: {error}") from None
    dit, z_dim = folder.dit_config, vae.get("z_dim", WAN_Z_DIM)
    wanted = (2 * z_dim + MASK_CHANNELS, z_dim)
    if (dit.in_channels, dit.out_channels) != wanted:
        raise _broken(
            f"{path}: a VAE of {z_dim} channels needs a transformer of {wanted[0]} channels in and {wanted[1]} out, "
            f"not {dit.in_channels} and {dit.out_channels}"
        )
    if text.get("d_model") != dit.text_dim:
        raise _broken(f"{path}: text_encoder/ gives {text.get('d_model')} features, transformer/ takes {dit.text_dim}")
    return folder


def load_dit(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> CausalDiT:
    """The DiT, with q, k and v of self-attention in one fused linear. Raises CheckpointError."""
    with torch.device("meta"):
        dit = CausalDiT(folder.dit_config)
    state = _allocate(dit, dtype, device)
    _fill(split_qkv(state), folder.path / "transformer", _original_name, progress)
    return _assign(dit, state)


def load_vae(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> StreamingVAE:
    """The VAE. Raises CheckpointError."""
    try:
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(_read_json(folder.path / "vae" / "config.json"))
    except (ValueError, TypeError) as error:
        raise _broken(f"{folder.path / 'vae'}: {error}") from None
    state = _allocate(vae, dtype, device)
    _fill(state, folder.path / "vae", lambda name: name, progress)
    return StreamingVAE(_assign(vae, state))


def load_text_encoder(
    folder: CheckpointFolder, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> TextEncoder:
    """UMT5's encoder and its tokenizer. Raises CheckpointError."""
    path = folder.path / "text_encoder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        config = UMT5Config.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _broken(f"{folder.path}: text encoder: {one_line(error)}") from None
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    state = _allocate(encoder, dtype, device)
    # One table with two names. A checkpoint has it under either name.
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    targets = {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    _fill(targets, path, lambda name: name.replace("encoder.embed_tokens.", "shared."), progress)
    encoder = _assign(encoder, state)
    encoder.tie_weights()
    return TextEncoder(tokenizer, encoder, folder.dit_config.text_len)


def _fetch(model_id: str) -> Path:
    """The hub's files, from its local cache or downloaded with a progress bar."""
    try:
        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise _broken(f"--model-path {model_id}: neither a folder that exists nor a hub id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _broken(
            f"--model-path {model_id}: no such folder, and the download from the hub failed ({one_line(error)}); "
            f"put its files in a folder and name the folder, for example --model-path ./models/{Path(model_id).name}"
        ) from None


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; ``default`` when the file does not exist."""
    if default is not None and not path.exists():
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _broken(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise _broken(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _broken(f"{path}: expected a JSON object")
    return values


def _allocate(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Allocates every parameter of a module that was built on the meta device."""
    return {name: torch.empty_like(value, dtype=dtype, device=device) for name, value in module.state_dict().items()}


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


def _fill(targets: dict[str, Tensor], folder: Path, rename: Callable[[str], str], progress: Progress | None) -> None:
    """Copies every tensor of the folder's safetensors files into its target. Raises CheckpointError."""
    missing, extra, misshapen = set(targets), [], []
    for done, name, tensor in _tensors(folder):
        target = targets.get(rename(name))
        missing.discard(rename(name))
        if target is None:
            extra.append(name)
        elif target.shape != tensor.shape:
            misshapen.append(f"{name} {list(tensor.shape)} for {list(target.shape)}")
        else:
            target.copy_(tensor)
        if progress is not None:
            progress(done)
    parts = []
    for what, names in (("missing", sorted(missing)), ("unexpected", extra), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - _LISTED_KEYS} more" if len(names) > _LISTED_KEYS else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:_LISTED_KEYS])}{more}")
    if parts:
        raise _broken(f"{folder} does not fit its config.json: {'; '.join(parts)}")


def _tensors(folder: Path) -> Iterator[tuple[float, str, Tensor]]:
    """(share done, name, tensor) of every tensor in the folder. Only one is in memory at a time."""
    files = _shards(folder)
    for number, path in enumerate(files):
        try:
            with safe_open(path, framework="pt") as shard:
                names = list(shard.keys())
                for i, name in enumerate(names):
                    yield (number + (i + 1) / len(names)) / len(files), name, shard.get_tensor(name)
        except SafetensorError as error:
            raise _broken(f"{path} is damaged: {error}") from None


def _shards(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index lists; all of them when there is no index."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    if not files:
        raise _broken(f"{folder} has no .safetensors file")
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise _broken(f"{folder} misses {len(absent)} of {len(files)} shards: {', '.join(absent[:_LISTED_KEYS])}")
    return files


def _broken(message: str) -> CheckpointError:
    return CheckpointError(message, field="model_path")
