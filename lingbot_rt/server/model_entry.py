"""The entry of /v1/models. From it a page learns what this server can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lingbot_rt.config import OUTPUT_FORMATS, ServeConfig
from lingbot_rt.server.first_frame import MAX_DECODED_PIXELS
from lingbot_rt.session.controls import MAX_PENDING, TOKENS
from lingbot_rt.session.messages import EXTENSIONS, FPS_RANGE, MAX_NUM_FRAMES, MAX_PROMPT_CHARACTERS, STEPS_RANGE
from lingbot_rt.session.plan import EngineStatus, ModelInfo
from lingbot_rt.session.settings import MIN_SIDE
from lingbot_rt.shapes import SIZE_MULTIPLE, FrameSize, latent_frames_for, num_frames_for

_COMMON_SIZES = ("832x480", "480x832", "640x640", "1280x720", "720x1280", "448x256", "256x448")


def model_entry(
    config: ServeConfig,
    info: ModelInfo | None,
    status: EngineStatus,
    *,
    warm_sizes: Iterable[FrameSize] | None,
    busy: bool,
    waiting: int,
) -> dict[str, Any]:
    """``info`` is None while the model loads. The fields that depend on it are then missing.

    ``warm_sizes``: those whose code is compiled; None when every session starts at once. ``waiting``: the clients in
    line.
    """
    entry: dict[str, Any] = {
        "id": config.model_id if info is None else info.model_id,
        "object": "model",
        "created": 0,
        "owned_by": "lingbot_rt",
        "ready": status.ready,
        "status": status.as_dict(),
        "busy": busy,
        "waiting": waiting,
        "action_tokens": list(TOKENS),
        "output_formats": list(OUTPUT_FORMATS),
        "default_output_format": config.default_output_format,
        "interactive_kv_window": {"default": config.interactive_kv_window},
        "extensions": list(EXTENSIONS),
        "features": {
            "upscaling": True,
            "frame_interpolation": True,
            "guidance": True,
            "camera_poses": True,
            "recache": True,
            "resume": config.resume_s > 0,
            "history": config.history_mb > 0,
        },
        "kept_worlds": {
            "resume_s": config.resume_s,
            "history_mb": config.history_mb,
            "exact": config.snapshot_kv,
            "outlive_the_server": config.park_dir is not None,
        },
        "fps": {"default": 16, "min": FPS_RANGE[0], "max": FPS_RANGE[1]},
        "limits": {
            "size_multiple": SIZE_MULTIPLE,
            "min_side": MIN_SIDE,
            "max_pixels": config.max_pixels,
            "max_message_bytes": config.max_message_mb * 2**20,
            "max_first_frame_pixels": MAX_DECODED_PIXELS,
            "max_prompt_characters": MAX_PROMPT_CHARACTERS,
            "max_pending_actions": MAX_PENDING,
            "init_timeout_s": config.init_timeout_s,
            "session_wait_s": config.session_wait_s,
            "max_waiting": config.max_waiting,
            "send_timeout_s": config.send_timeout_s,
        },
        "first_frame": {
            "bytes": True,
            "data_url": True,
            "path": config.first_frame_dir is not None,
            "url": config.allow_remote_first_frame,
        },
    }
    if info is not None:
        entry |= _of_model(info, config.max_pixels)
    if warm_sizes is not None:
        entry["warm_sizes"] = [str(size) for size in warm_sizes]
    return entry


def _of_model(info: ModelInfo, max_pixels: int) -> dict[str, Any]:
    sizes = [str(info.default_size)]
    for text in _COMMON_SIZES:
        size = FrameSize.parse(text)
        if size.is_whole_tokens and size.pixels <= max_pixels and text not in sizes:
            sizes.append(text)
    return {
        "device": info.device,
        "dtype": info.dtype,
        "vae_dtype": info.vae_dtype,
        "quantization": info.quantization,
        "attention_backend": info.attention_backend,
        "kv_cache_dtype": info.kv_cache_dtype,
        "compiled": info.compiled,
        "load_format": info.load_format,
        "num_ranks": info.num_ranks,
        "default_size": str(info.default_size),
        "sizes": sizes,
        "latent_frames": info.latent_frames,
        "num_frames": {
            "default": num_frames_for(info.latent_frames),
            "choices": [num_frames_for(latent) for latent in range(1, latent_frames_for(MAX_NUM_FRAMES) + 1)],
        },
        "num_inference_steps": {"default": info.num_steps, "min": STEPS_RANGE[0], "max": STEPS_RANGE[1]},
        "realtime_causal_sink_size": {"default": info.sink_frames},
        "realtime_causal_kv_cache_num_frames": {"default": info.window_frames},
    }
