"""The causal DiT with camera modulation: LingBot-World's transformer, one chunk of latent frames at a time.

The arithmetic is the reference's. Parameter names are the original checkpoint's, but q, k and v of self-attention are
one linear. Shapes: B batch, C channels, F latent frames, h x w latent cells, N tokens of the chunk (F h/2 w/2), L text
tokens, D model width, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.models.attention import WindowAttention, attend, resolve_backend, text_backend
from lingbot_rt.models.captured_forward import CapturedForwards
from lingbot_rt.models.fused_blocks import BlockOps, FusedForward, camera_modulation
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import Float8Linear
from lingbot_rt.models.rope import rope_tables, rotate
from lingbot_rt.shapes import PATCH_SIZE, VAE_SPATIAL_STRIDE

TextKV = list[tuple[Tensor, Tensor]]
"""Cross-attention keys and values [B, L, H, d] of every block."""

CameraModulation = list[tuple[Tensor, Tensor]]
"""Scale and shift [B, N, D] of every block."""

RAY_CHANNELS = 6 * VAE_SPATIAL_STRIDE**2
"""Channels of the ray map: origin and direction for each of the 8x8 pixels of a latent cell."""

COMPILED_SHAPES = 64
"""Compiled shapes per function. After as many sizes of frames and chunks, further ones run uncompiled."""


class TimeModulation(NamedTuple):
    """A timestep as the network's inputs."""

    embedding_BD: Tensor  # for the head, in the model's dtype
    projection_B6D: Tensor  # for the blocks, float32


class _Conditions(NamedTuple):
    """What the blocks of one forward get beside the chunk's tokens."""

    time: TimeModulation
    text_kv: TextKV
    camera: CameraModulation | None
    rope: tuple[Tensor, Tensor]  # of this rank's tokens
    cache: KVCache
    kernel: str  # of attention
    stop_at: int  # the block that only writes its K/V into the window; -1: none


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """The values of ``transformer/config.json``. The defaults are LingBot-World-Fast 14B's."""

    num_layers: int = 40
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    ffn_dim: int = 13824
    in_channels: int = 36
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    num_frames_per_block: int = 3
    sink_size: int = 3
    sliding_window_num_frames: int = 45

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiTConfig:
        """From config.json's object, ignoring unknown keys. Raises ValueError for a patch other than 1 x 2 x 2."""
        patch = values.get("patch_size", [1, PATCH_SIZE, PATCH_SIZE])
        if list(patch) != [1, PATCH_SIZE, PATCH_SIZE]:
            raise ValueError(f"patch_size {patch} is not [1, {PATCH_SIZE}, {PATCH_SIZE}]")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_frames(self) -> int:
        """Latent frames per chunk."""
        return self.num_frames_per_block

    @property
    def sink_frames(self) -> int:
        return self.sink_size

    @property
    def window_frames(self) -> int:
        return self.sliding_window_num_frames


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the full width (all heads), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()).to(x.dtype)


def modulated_norm(x_BND: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, computed in float32, returned in the dtype of ``x_BND``."""
    normed = F.layer_norm(x_BND.float(), x_BND.shape[-1:], eps=eps)
    return (normed * (1 + scale) + shift).to(x_BND.dtype)


def gated_residual(x_BND: Tensor, y_BND: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, computed in float32, returned in the dtype of ``x_BND``."""
    return (x_BND.float() + gate * y_BND.float()).to(x_BND.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        self.o = nn.Linear(dim, dim)

    def project(self, x_BND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (normed, then rotated by RoPE) and v, each [B, N, H, d]."""
        q, k, v = self.qkv(x_BND).chunk(3, dim=-1)
        q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        self.o = nn.Linear(dim, dim)

    def text_kv(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt, [B, L, H, d] each."""
        k = self.norm_k(self.k(text_BLD)).unflatten(-1, (self.heads, -1))
        return k, self.v(text_BLD).unflatten(-1, (self.heads, -1))

    def forward(self, x_BND: Tensor, text_kv: tuple[Tensor, Tensor], backend: str) -> Tensor:
        q = self.norm_q(self.q(x_BND)).unflatten(-1, (self.heads, -1))
        return self.o(attend(q, *text_kv, backend).flatten(2))


class Block(nn.Module):
    """A transformer layer: self-attention over the window, camera, text, feed-forward.

    Its two halves, before and after the attention kernel, are functions of tensors of fixed shapes, so each compiles by
    itself. The window between them changes with every chunk and stays outside of compiled code.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(config)
        self.cam_injector_layer1 = nn.Linear(dim, dim)
        self.cam_injector_layer2 = nn.Linear(dim, dim)
        self.cam_scale_layer = nn.Linear(dim, dim)
        self.cam_shift_layer = nn.Linear(dim, dim)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))

    def camera_modulation(self, camera_BND: Tensor) -> tuple[Tensor, Tensor]:
        z = camera_BND + self.cam_injector_layer2(F.silu(self.cam_injector_layer1(camera_BND)))
        return self.cam_scale_layer(z), self.cam_shift_layer(z)

    def before_attention(
        self, x_BND: Tensor, time_B6D: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of self-attention, [B, N, H, d] each."""
        shift, scale, *_ = self._modulation(time_B6D)
        return self.self_attn.project(modulated_norm(x_BND, scale, shift, self.eps), cos, sin)

    def after_attention(
        self,
        x_BND: Tensor,
        attended_BNHd: Tensor,
        time_B6D: Tensor,
        camera: tuple[Tensor, Tensor] | None,
        text_kv: tuple[Tensor, Tensor],
        backend: str,
    ) -> Tensor:
        """The block after the attention kernel -> [B, N, D]."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self._modulation(time_B6D)
        x = gated_residual(x_BND, self.self_attn.o(attended_BNHd.flatten(2)), gate)
        if camera is not None:
            scale, shift = camera
            x = (1 + scale) * x + shift
        normed = F.layer_norm(x.float(), x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps)
        x = x + self.cross_attn(normed.to(x.dtype), text_kv, backend)
        return gated_residual(x, self.ffn(modulated_norm(x, ffn_scale, ffn_shift, self.eps)), ffn_gate)

    def _modulation(self, time_B6D: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation.float() + time_B6D).split(1, dim=1)

    def modulation_of(self, time_6D: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate [D] of attention, then those of the feed-forward network, in float32."""
        return (self.modulation[0].float() + time_6D).unbind(0)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride, computed as a linear over patches."""

    def forward(self, x_BCFhw: Tensor) -> Tensor:
        """[B, C, F, h, w] -> tokens [B, N, D]."""
        return F.linear(patchify(x_BCFhw), self.weight.flatten(1), self.bias)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = nn.Linear(config.dim, config.out_channels * PATCH_SIZE**2)

    def forward(self, x_BND: Tensor, time_BD: Tensor) -> Tensor:
        shift, scale = (self.modulation + time_BD[:, None]).split(1, dim=1)
        normed = F.layer_norm(x_BND.float(), x_BND.shape[-1:], eps=self.eps).to(x_BND.dtype)
        return self.head(normed * (1 + scale) + shift)


class CausalDiT(nn.Module):
    """One forward predicts the velocity of a chunk and writes the chunk's K/V into the session's window."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.attention_backend = "auto"
        self.fused_ops: BlockOps | None = None
        self.captured: CapturedForwards | None = None
        self.window_attention = WindowAttention()
        self._camera_modulation = Block.camera_modulation
        self.before_attention = Block.before_attention
        self.after_attention = Block.after_attention
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, (1, PATCH_SIZE, PATCH_SIZE))
        self.patch_embedding_wancamctrl = nn.Linear(RAY_CHANNELS * PATCH_SIZE**2, dim)
        self.c2ws_hidden_states_layer1 = nn.Linear(dim, dim)
        self.c2ws_hidden_states_layer2 = nn.Linear(dim, dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        # For the type checker: a ModuleList does not know the type of its modules.
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(config) for _ in range(config.num_layers)))
        self.head = Head(config)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Runs the two halves of every block compiled. Compilation happens at the first use of each shape.

        A block's parameters are inputs of the compiled code, so all blocks share it.
        """
        from torch import _dynamo as dynamo  # imported here: it takes a second

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, COMPILED_SHAPES)

        def compiled(half: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(half, dynamic=False, backend=backend)

        self._camera_modulation = compiled(Block.camera_modulation)
        self.before_attention = compiled(Block.before_attention)
        self.after_attention = compiled(Block.after_attention)

    def fuse_blocks(self, ops: BlockOps | None = None) -> None:
        """Runs the blocks with fused operations: for inference of one session at a time. None: the Triton kernels."""
        if ops is None:
            from lingbot_rt.models.fused_kernels import TritonOps  # needs the package triton

            ops = TritonOps()
        self.fused_ops = ops

    def capture_forwards(self, device: torch.device) -> None:
        """Replays fused forwards as CUDA graphs, once a window is full and its chunks repeat."""
        self.captured = CapturedForwards(device)

    def text_kv(self, text_BLD: Tensor) -> TextKV:
        """Prompt embeddings [B, L, text_dim] -> K/V of every block, once per prompt. Zero rows count too."""
        text = self.text_embedding(text_BLD)
        return [block.cross_attn.text_kv(text) for block in self.blocks]

    def camera_modulation(self, ray_map: Tensor, into: CameraModulation | None = None) -> CameraModulation:
        """Ray map [B, 384, F, h, w] -> scale and shift of every block for this process's tokens, once per chunk.

        ``into``: those of another chunk, to be written over.
        """
        own = self.window_attention.own_tokens(patchify(ray_map), dim=1)
        modulation = self.modulation_of_rays(self.patch_embedding_wancamctrl(own))
        return list(modulation) if into is None else copy_pairs(modulation, into)

    def modulation_of_rays(self, embedded_BND: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Embedded ray maps -> scale and shift of every block, computed as they are asked for."""
        hidden = self.c2ws_hidden_states_layer1(embedded_BND)
        camera = embedded_BND + self.c2ws_hidden_states_layer2(F.silu(hidden))
        if self.fused_ops is not None and isinstance(self.blocks[0].cam_scale_layer, Float8Linear):
            return camera_modulation(self.fused_ops, self.blocks, camera)
        return (self._camera_modulation(block, camera) for block in self.blocks)

    def time_modulation(self, timestep: float | Tensor) -> TimeModulation:
        """A timestep, or a tensor [B] of one per sample -> the network's inputs, once per timestep of a session.

        The features are [cos(t f), sin(t f)] with f_i = 10000^(-i / (freq_dim / 2)).
        """
        like = self.head.modulation
        half = self.config.freq_dim // 2
        exponent = -torch.arange(half, dtype=torch.float64, device=like.device) / half
        if isinstance(timestep, Tensor):
            timestep = timestep.double().view(-1, 1)
        angle = (timestep * 10_000.0**exponent).view(-1, half)
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(like.dtype)
        time_BD = self.time_embedding(features)
        return TimeModulation(time_BD, self.time_projection(time_BD).unflatten(1, (6, -1)).float())

    def forward(
        self,
        x_BCFhw: Tensor,
        timestep: float | Tensor | TimeModulation,
        text_kv: TextKV,
        camera: CameraModulation | None,
        cache: KVCache,
        start_frame: int,
        *,
        commit: bool = False,
    ) -> Tensor | None:
        """Noisy latents and i2v condition [B, C, F, h, w] at ``timestep`` -> velocity [B, 16, F, h, w].

        ``timestep`` may be a result of ``time_modulation``. ``start_frame`` is the chunk's first latent frame, counted
        from the start of the session. With ``commit`` (the context pass) the last block stops once its K/V are in the
        window, and the result is None.
        """
        frames, height, width = x_BCFhw.shape[2], x_BCFhw.shape[3] // PATCH_SIZE, x_BCFhw.shape[4] // PATCH_SIZE
        cache.begin(start_frame, frames)
        own_tokens = self.window_attention.own_tokens
        tables = rope_tables(self.config.attention_head_dim, start_frame, frames, height, width, x_BCFhw.device)
        rope = own_tokens(tables[0], dim=0), own_tokens(tables[1], dim=0)
        time = timestep if isinstance(timestep, TimeModulation) else self.time_modulation(timestep)
        kernel = resolve_backend(self.attention_backend, x_BCFhw.device, x_BCFhw.dtype)

        # 1. Latent cells to tokens
        x_BND = own_tokens(self.patch_embedding(x_BCFhw), dim=1)

        # 2. Blocks
        stop_at = len(self.blocks) - 1 if commit else -1
        given = _Conditions(time, text_kv, camera, rope, cache, kernel, stop_at)
        own_BNK = self._run_blocks(x_BND, given) if self.fused_ops is None else self._run_fused(x_BND, given)
        if own_BNK is None:
            return None

        # 3. Tokens back to latent cells
        tokens = self.window_attention.all_tokens(own_BNK, frames * height * width)
        return unpatchify(tokens, frames, height, width)

    def _run_fused(self, x_BND: Tensor, given: _Conditions) -> Tensor | None:
        """``_run_blocks`` with fused operations, captured where the chunk is like others before and after it."""
        time, text_kv, camera, rope, cache, kernel, stop_at = given
        ops = self.fused_ops
        assert ops is not None
        assert x_BND.shape[0] == 1, "fused operations are for one session"

        def compute(inputs: tuple[Tensor, ...]) -> Tensor | None:
            x, projection_B6D, embedding_BD, cos, sin = inputs
            shared = FusedForward(ops, self.window_attention, projection_B6D[0], (cos, sin), cache, kernel)
            streamed = shared.run(self.blocks, x, text_kv, camera, stop_at)
            return None if streamed is None else self.head(streamed, embedding_BD)

        inputs = (x_BND, time.projection_B6D, time.embedding_BD, *rope)
        if self.captured is None or not (cache.repeats and self.window_attention.can_be_captured):
            return compute(inputs)
        tensors = [tensor.data_ptr() for pair in (*text_kv, *(camera or ())) for tensor in pair]
        layout = stop_at, kernel, cache.layout, self.window_attention.layout, *tensors
        return self.captured.run(layout, inputs, compute, self.window_attention.recording)

    def _run_blocks(self, x_BND: Tensor, given: _Conditions) -> Tensor | None:
        """This rank's tokens through blocks and head -> [B, N, 4 * 16]. Block ``stop_at`` only writes its K/V: None.

        The two halves of each block are plain or compiled functions.
        """
        time, text_kv, camera, rope, cache, kernel, stop_at = given
        time_B6D = time.projection_B6D
        text_kernel = text_backend(kernel, x_BND.device, x_BND.dtype)
        for i, block in enumerate(self.blocks):
            q, k, v = self.before_attention(block, x_BND, time_B6D, *rope)
            if i == stop_at:
                self.window_attention.store(k, v, cache, i)
                return None
            attended = self.window_attention(q, k, v, cache, i, kernel)
            modulation = None if camera is None else camera[i]
            x_BND = self.after_attention(block, x_BND, attended, time_B6D, modulation, text_kv[i], text_kernel)
        return self.head(x_BND, time.embedding_BD)


def copy_pairs(
    pairs: Iterable[tuple[Tensor, Tensor]], into: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Writes every block's two tensors over those of ``into``, which it returns: captured forwards know these."""
    for new, old in zip(pairs, into, strict=True):
        for mine, given in zip(old, new, strict=True):
            mine.copy_(given)
    return into


def patchify(x_BCFhw: Tensor) -> Tensor:
    """[B, C, F, h, w] -> tokens [B, N, 4 * C]. A token's features are in the order (channel, dy, dx)."""
    x = x_BCFhw.unflatten(4, (-1, PATCH_SIZE)).unflatten(3, (-1, PATCH_SIZE))
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(x_BNK: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Tokens [B, N, 4 * C], features in the order (dy, dx, channel) -> [B, C, F, h, w]."""
    x = x_BNK.unflatten(2, (PATCH_SIZE, PATCH_SIZE, -1)).unflatten(1, (frames, height, width))
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The DiT's parameters under the original checkpoint's names: a fused qkv becomes views of q, k and v."""
    split = {}
    for name, tensor in state.items():
        if ".self_attn.qkv." in name:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}.")] = rows
        else:
            split[name] = tensor
    return split
