"""The DiT's blocks as matrix products, attention, and few operations between them, each one pass over memory.

It computes what ``dit.Block`` computes, for one session on a GPU. Nothing in it is compiled for a frame size. The
operations are Triton kernels (``fused_kernels.TritonOps``); ``PlainOps`` has them in plain torch.

Shapes: N tokens of this rank, D model width, H heads, d head_dim, M rows, K features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.models.attention import WindowAttention, attend
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import FP8, Float8Linear, Rows, hadamard, quantize_rows, to_float8
from lingbot_rt.models.rope import rotate

if TYPE_CHECKING:
    from lingbot_rt.models.dit import Block, CameraModulation, TextKV

NormTarget = Literal["same", "fp8"]
"""The format of a norm's result: that of its input, or fp8 rows with scales."""

Activation = Literal["none", "gelu", "silu"]
"""``gelu`` is the tanh form."""


class Residual(NamedTuple):
    """What is added to the stream before a norm: x + gate y, and then the camera's (1 + scale) x + shift."""

    y_ND: Tensor
    gate_D: Tensor | None = None  # float32
    camera: tuple[Tensor, Tensor] | None = None  # scale and shift [N, D]


class Affine(NamedTuple):
    """What follows a norm: gain n + shift, with ``plus_one`` (1 + gain) n + shift."""

    gain_D: Tensor
    shift_D: Tensor
    plus_one: bool = False


class BlockOps(Protocol):
    """The operations between a block's matrix products."""

    def residual_norm(
        self, x_ND: Tensor, residual: Residual | None, affine: Affine, eps: float, target: NormTarget
    ) -> Tensor | Rows:
        """Adds ``residual`` to ``x_ND`` IN PLACE, rounded; returns its layer norm over D with ``affine`` applied."""

    def quantize(self, x_MK: Tensor, activation: Activation = "none", plus: Tensor | None = None) -> Rows:
        """fp8 rows of activation(x) + plus."""

    def project_heads(
        self,
        qkv_N3D: Tensor,
        weights: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        eps: float,
        out: tuple[Tensor, Tensor, Tensor],
        rows_N: Tensor | None = None,
        shifts_P: Tensor | None = None,
    ) -> None:
        """q and k, RMS-normed over D with ``weights`` and rotated, and v, into ``out``: [N, H, d] of any float type.

        Their heads may be two dimensions, [N, P, H / P, d]. If the keys are in fp8, q and k are mixed by ``hadamard``.
        ``rows_N``: the rows of k and v in ``out`` that take each token's; -1: none. ``shifts_P``: see ``TritonOps``,
        which alone takes it.
        """

    def store_rows(self, rows_N: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        """Row i of the first tensor [N, H, d] of both pairs into row ``rows_N[i]`` of the second; -1: nowhere."""

    def head_norm(self, q_ND: Tensor, weight: Tensor, eps: float, heads: int) -> Tensor:
        """RMS norm over D -> [N, H, d]."""


def gated_sum(x_ND: Tensor, residual: Residual) -> Tensor:
    """x + gate y in float32."""
    y = residual.y_ND.float()
    return x_ND.float() + (y if residual.gate_D is None else residual.gate_D * y)


class PlainOps:
    """BlockOps in plain torch: what the kernels are tested against."""

    def residual_norm(
        self, x_ND: Tensor, residual: Residual | None, affine: Affine, eps: float, target: NormTarget
    ) -> Tensor | Rows:
        if residual is not None:
            total = gated_sum(x_ND, residual)
            if residual.camera is not None:
                scale, shift = residual.camera
                total = (1 + scale.float()) * total + shift.float()
            x_ND.copy_(total)
        gain = affine.gain_D.float() + 1 if affine.plus_one else affine.gain_D.float()
        normed = F.layer_norm(x_ND.float(), x_ND.shape[-1:], eps=eps) * gain + affine.shift_D.float()
        normed = normed.to(x_ND.dtype)
        return quantize_rows(normed) if target == "fp8" else normed

    def quantize(self, x_MK: Tensor, activation: Activation = "none", plus: Tensor | None = None) -> Rows:
        x = x_MK.float()
        if activation != "none":
            x = F.gelu(x, approximate="tanh") if activation == "gelu" else F.silu(x)
        return quantize_rows((x if plus is None else x + plus.float()).to(x_MK.dtype))

    def project_heads(
        self,
        qkv_N3D: Tensor,
        weights: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        eps: float,
        out: tuple[Tensor, Tensor, Tensor],
        rows_N: Tensor | None = None,
        shifts_P: Tensor | None = None,
    ) -> None:
        assert shifts_P is None, "plain torch writes to this process's memory only"
        parts = qkv_N3D.chunk(3, dim=-1)
        heads = out[0].shape[1:-1].numel()
        q, k = (rotate(self.head_norm(parts[i], weights[i], eps, heads), *rope) for i in range(2))
        if out[1].dtype == FP8:
            q, k = hadamard(q), hadamard(k)
        _fill(out[0], q)
        _fill(out[1], k, rows_N)
        _fill(out[2], parts[2].unflatten(-1, (heads, -1)), rows_N)

    def store_rows(self, rows_N: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        for source, target in (keys, values):
            _fill(target, source, rows_N)

    def head_norm(self, q_ND: Tensor, weight: Tensor, eps: float, heads: int) -> Tensor:
        normed = (F.rms_norm(q_ND.float(), q_ND.shape[-1:], eps=eps) * weight.float()).to(q_ND.dtype)
        return normed.unflatten(-1, (heads, -1))


def _fill(target: Tensor, values: Tensor, rows_N: Tensor | None = None) -> None:
    values = values.reshape(len(values), *target.shape[1:])
    if target.dtype == FP8 != values.dtype:
        values = to_float8(values)
    if rows_N is None:
        target.copy_(values)
    else:
        # As bytes: not every type can be indexed.
        kept = rows_N >= 0
        target.view(torch.uint8)[rows_N[kept]] = values[kept].to(target.dtype).contiguous().view(torch.uint8)


class FusedForward(NamedTuple):
    """What the blocks of one forward share."""

    ops: BlockOps
    attention: WindowAttention
    time_6D: Tensor  # float32
    rope: tuple[Tensor, Tensor]
    cache: KVCache
    kernel: str  # of attention

    def run(
        self, blocks: Iterable[Block], x_BND: Tensor, text_kv: TextKV, camera: CameraModulation | None, stop_at: int
    ) -> Tensor | None:
        """The stream after the last block [1, N, D]; ``x_BND`` is overwritten.

        Block number ``stop_at`` only writes its K/V into the window; the result is then None.
        """
        x = x_BND[0]
        # Of the block before: added by the pass that the next norm makes anyway.
        pending: Residual | None = None
        for i, block in enumerate(blocks):
            shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = block.modulation_of(self.time_6D)
            normed = self._norm(x, pending, Affine(gain, shift, plus_one=True), block.eps, block.self_attn.qkv)
            projected = _Projection(self, block, _linear(block.self_attn.qkv, normed))
            if i == stop_at:
                self.attention.store_projected(projected, self.cache, i)
                return None
            attended = self.attention.attend_projected(projected, self.cache, i, self.kernel)
            o = self._project(block.self_attn.o, attended[0].flatten(1))
            residual = Residual(o, gate, None if camera is None else (camera[i][0][0], camera[i][1][0]))
            cross = block.cross_attn
            normed = self._norm(x, residual, Affine(block.norm3.weight, block.norm3.bias), block.eps, cross.q)
            q = self.ops.head_norm(_linear(cross.q, normed), cross.norm_q.weight, cross.norm_q.eps, cross.heads)
            from_text = self._project(cross.o, attend(q[None], *text_kv[i], self.kernel)[0].flatten(1))
            first, _, second = block.ffn
            normed = self._norm(x, Residual(from_text), Affine(ffn_gain, ffn_shift, plus_one=True), block.eps, first)
            pending = Residual(self._feed_forward(first, second, normed), ffn_gate)
        assert pending is not None, "a DiT has at least one block"
        return gated_sum(x, pending).to(x.dtype)[None]

    def _norm(
        self, x: Tensor, residual: Residual | None, affine: Affine, eps: float, reader: nn.Module
    ) -> Tensor | Rows:
        """The norm in the format that the linear ``reader`` takes."""
        return self.ops.residual_norm(x, residual, affine, eps, "fp8" if isinstance(reader, Float8Linear) else "same")

    def _project(self, linear: nn.Module, x_MK: Tensor) -> Tensor:
        return _linear(linear, self.ops.quantize(x_MK) if isinstance(linear, Float8Linear) else x_MK)

    def _feed_forward(self, first: nn.Module, second: nn.Module, x: Tensor | Rows) -> Tensor:
        if isinstance(second, Float8Linear):
            return _linear(second, self.ops.quantize(_linear(first, x), "gelu"))
        if isinstance(first, nn.Linear) and isinstance(x, Tensor) and x.is_cuda and x.dtype == torch.bfloat16:
            # GELU inside the matrix product: one pass less over the widest tensor.
            hidden = torch._addmm_activation(first.bias, x, first.weight.T, use_gelu=True)
        else:
            hidden = F.gelu(_linear(first, x), approximate="tanh")
        return _linear(second, hidden)


def camera_modulation(ops: BlockOps, blocks: Iterable[Block], camera_BND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``Block.camera_modulation`` of every block, for fp8 linears: each input is rounded to fp8 once."""
    camera = camera_BND[0]
    rows = ops.quantize(camera)
    for block in blocks:
        hidden = ops.quantize(_linear(block.cam_injector_layer1, rows), "silu")
        z = ops.quantize(_linear(block.cam_injector_layer2, hidden), plus=camera)
        yield _linear(block.cam_scale_layer, z)[None], _linear(block.cam_shift_layer, z)[None]


class _Projection(NamedTuple):
    """attention.ProjectedChunk of one block."""

    forward: FusedForward
    block: Block
    qkv_N3D: Tensor

    def write(
        self, q: Tensor, k: Tensor, v: Tensor, *, rows_N: Tensor | None = None, shifts_P: Tensor | None = None
    ) -> None:
        attention = self.block.self_attn
        weights = (attention.norm_q.weight, attention.norm_k.weight)
        self.forward.ops.project_heads(
            self.qkv_N3D, weights, self.forward.rope, attention.norm_q.eps, (q, k, v), rows_N, shifts_P
        )

    def store_rows(self, rows_N: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        self.forward.ops.store_rows(rows_N, keys, values)

    @property
    def dtype(self) -> torch.dtype:
        return self.qkv_N3D.dtype

    @property
    def device(self) -> torch.device:
        return self.qkv_N3D.device

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, width = self.qkv_N3D.shape
        heads = self.block.self_attn.heads
        return tokens, heads, width // (3 * heads)


def _linear(linear: nn.Module, x: Tensor | Rows) -> Tensor:
    """``linear`` of rows in its own format -> [M, K]."""
    if isinstance(x, Rows):
        assert isinstance(linear, Float8Linear)
        return linear.product(x)
    return linear(x)
