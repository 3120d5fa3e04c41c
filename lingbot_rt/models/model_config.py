"""What the JSON files of a model folder may say. Every value that is read has a kind and a range here.

Raises CheckpointError that names file, key, value and what is expected, before any weight is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.file_checks import broken
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.json_file import JsonFile, Value, flag, list_of, nullable, number, one_of, text, whole
from lingbot_rt.shapes import PATCH_SIZE, SIZE_MULTIPLE, VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE, FrameSize

TRAINED_SIZE = FrameSize(832, 480)

_WAN_Z_DIM = 16
_SIDES = f'WIDTHxHEIGHT in multiples of {SIZE_MULTIPLE}, for example "832x480"'
_WIDTH = whole(1, 2**20)
_COUNT = whole(1, 1024)

_DIT: dict[str, Value] = {
    "num_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "attention_head_dim": whole(2, 1024, multiple=2),
    "ffn_dim": _WIDTH,
    "in_channels": whole(1, 4096),
    "out_channels": whole(1, 4096),
    "text_dim": _WIDTH,
    "text_len": whole(1, 65536),
    "freq_dim": whole(2, 65536, multiple=2),
    "eps": number(above=0, high=1),
    "num_frames_per_block": _COUNT,
    "sink_size": whole(0, 10**6),
    "sliding_window_num_frames": whole(1, 10**6),
}

_VAE: dict[str, Value] = {
    "base_dim": whole(1, 4096),
    "decoder_base_dim": nullable(whole(1, 4096)),
    "z_dim": whole(1, 1024),
    "dim_mult": list_of(whole(1, 64), 1, 8),
    "num_res_blocks": whole(1, 64),
    "attn_scales": list_of(number(), 0, 8),
    "temperal_downsample": list_of(flag(), 0, 7),
    "dropout": number(low=0, high=1),
    "latents_mean": list_of(number(), 1, 1024),
    "latents_std": list_of(number(above=0), 1, 1024),
    "is_residual": flag(),
    "in_channels": whole(1, 1024),
    "out_channels": whole(1, 1024),
    "patch_size": nullable(whole(1, 8)),
    "scale_factor_temporal": nullable(whole(1, 64)),
    "scale_factor_spatial": nullable(whole(1, 64)),
}
"""The arguments of diffusers' AutoencoderKLWan."""

_TEXT_ENCODER: dict[str, Value] = {
    "d_model": _WIDTH,
    "d_kv": whole(1, 4096),
    "d_ff": _WIDTH,
    "num_layers": _COUNT,
    "num_heads": _COUNT,
    "vocab_size": whole(1, 2**24),
    "relative_attention_num_buckets": whole(2, 65536, multiple=2),
    "relative_attention_max_distance": whole(2, 2**20),
    "dropout_rate": number(low=0, high=1),
    "layer_norm_epsilon": number(above=0, high=1),
    "feed_forward_proj": text('an activation, for example "gated-gelu"', bool),
}


def is_lingbot_world(name: str) -> bool:
    """Whether a class is of the LingBot-World family: projects write its name in several ways."""
    return "lingbotworld" in name.lower()


def read_dit_config(path: Path) -> DiTConfig:
    """transformer/config.json."""
    file = JsonFile(path)
    file.get("_class_name", text("a LingBot-World transformer", is_lingbot_world))
    patch = [1, PATCH_SIZE, PATCH_SIZE]
    file.get("patch_size", one_of((patch,), str(patch)))
    return DiTConfig.from_dict(file.take(_DIT))


def read_vae_config(path: Path) -> dict[str, Any]:
    """vae/config.json -> the arguments of AutoencoderKLWan that it gives."""
    file = JsonFile(path)
    file.get("_class_name", one_of(("AutoencoderKLWan",), '"AutoencoderKLWan"'))
    values = file.take(_VAE)
    z_dim, patch = values.get("z_dim", _WAN_Z_DIM), values.get("patch_size") or 1
    for key in ("latents_mean", "latents_std"):
        if len(values.get(key, [0.0] * _WAN_Z_DIM)) != z_dim:
            file.refuse(key, f"a list of {z_dim} values, one per channel of z_dim")
    for key in ("in_channels", "out_channels"):
        if values.get(key, 3) != 3 * patch**2:
            file.refuse(key, f"{3 * patch**2}: the colours of {patch} x {patch} pixels")
    halvings = values.get("temperal_downsample", [False, True, True])
    levels = values.get("dim_mult", [1, 2, 4, 4])
    if len(halvings) != len(levels) - 1:
        file.refuse("temperal_downsample", f"{len(levels) - 1} values, one less than dim_mult has")
    strides = 2 ** len(halvings) * patch, 2 ** sum(halvings)
    if strides != (VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE):
        raise broken(
            f"{path}: a latent cell is {strides[0]} pixels and {strides[1]} frames by dim_mult, patch_size and "
            f"temperal_downsample, expected {VAE_SPATIAL_STRIDE} pixels and {VAE_TEMPORAL_STRIDE} frames"
        )
    return values


def read_text_config(path: Path) -> JsonFile:
    """text_encoder/config.json. It also has values that only transformers reads."""
    file = JsonFile(path)
    file.get("model_type", one_of(("umt5",), '"umt5"'))
    file.get("architectures", nullable(list_of(text("a UMT5 class", lambda name: name.startswith("UMT5")), 1, 1)))
    file.take(_TEXT_ENCODER)
    return file


def read_default_size(index: JsonFile) -> FrameSize:
    """The size in model_index.json; 832x480 without one."""
    given = index.get("default_size", text(_SIDES, lambda size: bool(size.strip())))
    if given is None:
        return TRAINED_SIZE
    try:
        size = FrameSize.parse(given)
    except ValueError:
        index.refuse("default_size", _SIDES)
    if not size.is_whole_tokens or not size.pixels:
        index.refuse("default_size", _SIDES)
    return size


def read_model_index(path: Path) -> JsonFile:
    """model_index.json, which may be missing. Its class may be the one that LingBot-World was made from."""
    file = JsonFile(path, optional=True)
    expected = "a LingBot-World or Wan pipeline"
    file.get("_class_name", text(expected, lambda name: is_lingbot_world(name) or name.startswith("Wan")))
    return file


def other_components(index: JsonFile, read: tuple[str, ...]) -> list[str]:
    """Networks that model_index.json names beside those that are ``read``: ``NAME/``."""
    parts = {name: value for name, value in index.values.items() if isinstance(value, list) and any(value)}
    return [f"{name}/" for name in parts if name not in (*read, "scheduler")]


def require_fit(path: Path, dit: DiTConfig, vae: dict[str, Any], text_encoder: JsonFile) -> None:
    """Raises CheckpointError unless transformer, VAE and text encoder of the folder ``path`` fit each other."""
    z_dim = vae.get("z_dim", _WAN_Z_DIM)
    wanted = (2 * z_dim + MASK_CHANNELS, z_dim)
    if (dit.in_channels, dit.out_channels) != wanted:
        raise broken(
            f"{path}: a VAE of {z_dim} channels needs a transformer of {wanted[0]} channels in and {wanted[1]} out, "
            f"not {dit.in_channels} and {dit.out_channels}: fetch both again"
        )
    features = text_encoder.get("d_model", _WIDTH, "no")
    if features != dit.text_dim:
        raise broken(
            f"{path}: text_encoder/ gives {features} features, transformer/ takes {dit.text_dim}: fetch both again"
        )
