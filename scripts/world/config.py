"""Sizes of the trained world: the configurations in its checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.shapes import FrameSize
from scripts.world.place_channels import PLACE_CHANNELS

CHUNK_FRAMES = 3
"""Latent frames per chunk."""


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """docs/training.md gives the reasons."""

    size: FrameSize = field(default_factory=lambda: FrameSize(160, 96))
    picture_channels: int = 24  # of the latents; those of the place follow
    vae_width: int = 32  # of the encoder, which runs once per session
    vae_decoder_width: int = 24
    dit_heads: int = 4
    dit_head_dim: int = 64
    dit_layers: int = 12
    text_dim: int = 128
    text_len: int = 64
    vocabulary: int = 1200
    shift: float = 2.0
    steps: tuple[int, ...] = (1000, 230)
    sample_chunks: int = 9  # per training sample: the first of its session and eight in a row
    supersample: int = 2

    @property
    def z_dim(self) -> int:
        return self.picture_channels + PLACE_CHANNELS

    @property
    def schedule(self) -> FlowSchedule:
        return FlowSchedule(self.shift, self.steps)

    @property
    def transformer(self) -> dict[str, Any]:
        return {
            "_class_name": "CausalLingBotWorldTransformer3DModel",
            "patch_size": [1, 2, 2],
            "text_len": self.text_len,
            "num_attention_heads": self.dit_heads,
            "attention_head_dim": self.dit_head_dim,
            "in_channels": 2 * self.z_dim + MASK_CHANNELS,
            "out_channels": self.z_dim,
            "text_dim": self.text_dim,
            "freq_dim": 128,
            "ffn_dim": 4 * self.dit_heads * self.dit_head_dim,
            "num_layers": self.dit_layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "sink_size": 3,
            "num_frames_per_block": CHUNK_FRAMES,
            "sliding_window_num_frames": 12,
        }

    @property
    def dit(self) -> DiTConfig:
        return DiTConfig.from_dict(self.transformer)

    @property
    def vae(self) -> dict[str, Any]:
        return {
            "_class_name": "AutoencoderKLWan",
            "attn_scales": [],
            "base_dim": self.vae_width,
            "decoder_base_dim": self.vae_decoder_width,
            "dim_mult": [1, 2, 4],
            "dropout": 0.0,
            "in_channels": 12,
            "out_channels": 12,
            "is_residual": False,
            "num_res_blocks": 1,
            "patch_size": 2,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
            "temperal_downsample": [True, True],
            "z_dim": self.z_dim,
            "latents_mean": [0.0] * self.z_dim,
            "latents_std": [1.0] * self.z_dim,
        }

    @property
    def text_encoder(self) -> dict[str, Any]:
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            "d_model": self.text_dim,
            "d_ff": 2 * self.text_dim,
            "d_kv": self.text_dim // 4,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "vocab_size": self.vocabulary,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "use_cache": False,
        }

    @property
    def scheduler(self) -> dict[str, Any]:
        return {
            "_class_name": "SelfForcingFlowMatchScheduler",
            "num_train_timesteps": 1000,
            "shift": self.shift,
            "sigma_min": 0.0,
            "extra_one_step": True,
            "dmd_denoising_steps": list(self.steps),
            "warp_denoising_step": True,
        }


FULL = WorldConfig()
TINY = WorldConfig(
    size=FrameSize(32, 32),
    picture_channels=4,
    vae_width=4,
    vae_decoder_width=4,
    dit_heads=2,
    dit_head_dim=24,
    dit_layers=2,
    text_dim=32,
    text_len=24,
    vocabulary=400,
    sample_chunks=4,
    supersample=1,
)
"""For tests: every part, at a size that trains in milliseconds per step on a CPU."""

SMALL = WorldConfig(
    size=FrameSize(80, 48),
    picture_channels=16,
    vae_width=16,
    vae_decoder_width=16,
    dit_heads=2,
    dit_head_dim=64,
    dit_layers=4,
    text_len=32,
    sample_chunks=5,
)
"""Every stage learns within minutes on a CPU. Too small for a usable world."""

CONFIGS = {"full": FULL, "small": SMALL, "tiny": TINY}
