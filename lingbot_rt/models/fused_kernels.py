"""Triton kernels for what lies between the matrix products of a block: one pass over memory each.

``fused_blocks.PlainOps`` says in plain torch what each computes. No kernel depends on the number of rows, so another
frame size compiles nothing. One program has one row of activations in its registers.

Shapes: N rows (tokens), D model width, H heads, d head_dim, K features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingbot_rt.models.fused_blocks import Activation, Affine, NormTarget, Residual
from lingbot_rt.models.quantize import FP8, LEAST_SCALE, MAX, Rows, hadamard_block

_FP8_MAX = tl.constexpr(MAX)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


@triton.jit
def _store_quantized(x, x_type, at, inside, out_ptr, scale_ptr):
    """Rounds a row to ``x_type``, then to fp8 with one scale for the row."""
    x = tl.where(inside, x.to(x_type).to(tl.float32), 0.0)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / _FP8_MAX, _LEAST_SCALE)
    tl.store(out_ptr + at, (x / scale).to(tl.float8e4nv), inside)
    tl.store(scale_ptr, scale)


@triton.jit
def _residual_norm(
    x_ptr,
    y_ptr,
    gate_ptr,
    camera_scale_ptr,
    camera_shift_ptr,
    gain_ptr,
    shift_ptr,
    out_ptr,
    scale_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_CAMERA: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    x_type = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * D + at, inside, other=0.0).to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + row * D + at, inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            y *= tl.load(gate_ptr + at, inside, other=0.0)
        x += y
        if HAS_CAMERA:
            scale = tl.load(camera_scale_ptr + row * D + at, inside, other=0.0).to(tl.float32)
            x = (1 + scale) * x + tl.load(camera_shift_ptr + row * D + at, inside, other=0.0).to(tl.float32)
        rounded = x.to(x_type)
        tl.store(x_ptr + row * D + at, rounded, inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    gain = tl.load(gain_ptr + at, inside, other=0.0).to(tl.float32)
    if PLUS_ONE:
        gain += 1
    normed = centred * inverse * gain + tl.load(shift_ptr + at, inside, other=0.0).to(tl.float32)
    if QUANTIZE:
        _store_quantized(normed, x_type, row * D + at, inside, out_ptr, scale_ptr + row)
    else:
        tl.store(out_ptr + row * D + at, normed.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _quantize_rows(
    x_ptr,
    y_ptr,
    out_ptr,
    scale_ptr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_Y: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < K
    x = tl.load(x_ptr + row * K + at, inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        # x / 2 (1 + tanh(u)) = x sigmoid(2 u)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x *= tl.sigmoid(x)
    if HAS_Y:
        x += tl.load(y_ptr + row * K + at, inside, other=0.0).to(tl.float32)
    _store_quantized(x, x_ptr.dtype.element_ty, row * K + at, inside, out_ptr, scale_ptr + row)


@triton.jit
def _store_heads(ptr, shifts_ptr, peer_stride, at, x, inside, PEER: tl.constexpr, SHIFTS: tl.constexpr):
    """Each PEER features, the heads of one rank, go to a place of their own: ``peer_stride`` apart, or by SHIFTS."""
    x = x.to(ptr.dtype.element_ty)
    if SHIFTS == 0:
        tl.store(ptr + (at // PEER) * peer_stride + at % PEER, x, inside)
    else:
        unit: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        for peer in tl.static_range(SHIFTS):
            place = ptr + tl.load(shifts_ptr + peer) * unit
            tl.store(place + (at - peer * PEER), x, inside & (at // PEER == peer))


@triton.jit
def _project_heads(
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    shifts_ptr,
    rows_ptr,
    q_stride,
    k_stride,
    v_stride,
    q_peer_stride,
    k_peer_stride,
    v_peer_stride,
    eps,
    D: tl.constexpr,
    PEER: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    PARTS: tl.constexpr,
    HADAMARD: tl.constexpr,
    HADAMARD_SCALE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < D
    x = tl.load(x_ptr + row * (PARTS * D) + part * D + at, inside, other=0.0).to(tl.float32)
    kept = row
    if HAS_ROWS:
        kept = tl.load(rows_ptr + row)
    is_kept = inside & (kept >= 0)
    if part == 2:
        _store_heads(v_ptr + kept * v_stride, shifts_ptr, v_peer_stride, at, x, is_kept, PEER, SHIFTS)
    else:
        weight_ptr = q_weight_ptr
        if part == 1:
            weight_ptr = k_weight_ptr
        weight = tl.load(weight_ptr + at, inside, other=0.0).to(tl.float32)
        x = x / tl.sqrt(tl.sum(x * x, axis=0) / D + eps) * weight
        if ROTATE:
            # Neighbours stay in one thread's registers: a tile with a dimension of 2 was ten times as slow.
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
            even, odd = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
            pair = tl.arange(0, BLOCK // 2)
            cos = tl.load(cos_ptr + row * PAIRS + pair % PAIRS)
            sin = tl.load(sin_ptr + row * PAIRS + pair % PAIRS)
            x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])
        if HADAMARD > 1:
            # The sign of a Hadamard matrix at (i, j) is the parity of the bits that both have.
            common = tl.arange(0, HADAMARD)[:, None] & tl.arange(0, HADAMARD)[None, :]
            common ^= common >> 4
            common ^= common >> 2
            common ^= common >> 1
            signs = (1 - 2 * (common & 1)).to(tl.float16)
            # Normed values are far from float16's limit, and it is finer than bfloat16.
            mixed = tl.dot(tl.reshape(x, [BLOCK // HADAMARD, HADAMARD]).to(tl.float16), signs)
            x = tl.reshape(mixed, [BLOCK]) * HADAMARD_SCALE
        if part == 0:
            _store_heads(q_ptr + row * q_stride, shifts_ptr, q_peer_stride, at, x, inside, PEER, SHIFTS)
        else:
            _store_heads(k_ptr + kept * k_stride, shifts_ptr, k_peer_stride, at, x, is_kept, PEER, SHIFTS)


@triton.jit(do_not_specialize=["each", "remainder"])  # another frame size compiles nothing
def _push_rows(src_ptr, dst_ptr, shifts_ptr, each, remainder, row_stride, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    peer = tl.program_id(1)
    start = peer * each + tl.minimum(peer, remainder)
    total = (each + (peer < remainder).to(tl.int32)) * WORDS
    src = src_ptr + start.to(tl.int64) * WORDS
    dst = dst_ptr + tl.load(shifts_ptr + peer) * 2  # words of 8 bytes
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    to = (at // WORDS).to(tl.int64) * row_stride + at % WORDS
    tl.store(dst + to, tl.load(src + at, inside), inside)


@triton.jit
def _store_rows(
    k_ptr, v_ptr, k_into_ptr, v_into_ptr, rows_ptr, stride, into_stride, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(rows_ptr + row)
    at = tl.arange(0, BLOCK)
    inside = (at < WORDS) & (kept >= 0)
    src, dst = k_ptr, k_into_ptr
    if tl.program_id(1) == 1:
        src, dst = v_ptr, v_into_ptr
    tl.store(dst + kept * into_stride + at, tl.load(src + row * stride + at, inside), inside)


_WORD = torch.int64
_PUSHED = 4096  # words by one program


def push_rows(sent_NK: Tensor, to_nK: Tensor, shifts_P: Tensor) -> None:
    """Writes the contiguous rows of ``sent_NK`` to the ranks whose tokens they are: row i of rank r to ``to_nK[i]``
    there. K and the strides in bytes are multiples of 8. ``shifts_P``: see ``TritonOps.project_heads``."""
    src, dst = sent_NK.view(_WORD), to_nK.view(_WORD)
    each, remainder = divmod(len(src), len(shifts_P))
    largest = (each + (remainder > 0)) * src.shape[1]
    _push_rows[(triton.cdiv(largest, _PUSHED), len(shifts_P))](
        src, dst, shifts_P, each, remainder, dst.stride(0), WORDS=src.shape[1], BLOCK=_PUSHED, num_warps=8
    )


def _warps(features: int) -> int:
    """A row stays in registers. On an H200 4 warps are faster than 2 and 8 for the rows of the 14B."""
    return max(1, min(4, triton.next_power_of_2(features) // 512))


class TritonOps:
    """``fused_blocks.PlainOps`` as Triton kernels. Rows must be contiguous."""

    def residual_norm(
        self, x_ND: Tensor, residual: Residual | None, affine: Affine, eps: float, target: NormTarget
    ) -> Tensor | Rows:
        rows, width = x_ND.shape
        quantize = target == "fp8"
        out = torch.empty_like(x_ND, dtype=FP8 if quantize else x_ND.dtype)
        scale = torch.empty(rows, 1, dtype=torch.float32, device=x_ND.device) if quantize else out
        y, gate, camera = residual or Residual(x_ND)
        camera_scale, camera_shift = (x_ND, x_ND) if camera is None else camera
        _residual_norm[(rows,)](
            x_ND,
            y,
            x_ND if gate is None else gate,
            camera_scale,
            camera_shift,
            affine.gain_D,
            affine.shift_D,
            out,
            scale,
            eps,
            D=width,
            BLOCK=triton.next_power_of_2(width),
            HAS_Y=residual is not None,
            HAS_GATE=gate is not None,
            HAS_CAMERA=camera is not None,
            PLUS_ONE=affine.plus_one,
            QUANTIZE=quantize,
            num_warps=_warps(width),
        )
        return Rows(out, scale) if quantize else out

    def quantize(self, x_MK: Tensor, activation: Activation = "none", plus: Tensor | None = None) -> Rows:
        rows, features = x_MK.shape
        out = torch.empty_like(x_MK, dtype=FP8)
        scale = torch.empty(rows, 1, dtype=torch.float32, device=x_MK.device)
        _quantize_rows[(rows,)](
            x_MK,
            x_MK if plus is None else plus,
            out,
            scale,
            K=features,
            BLOCK=triton.next_power_of_2(features),
            ACTIVATION=activation,
            HAS_Y=plus is not None,
            num_warps=_warps(features),
        )
        return Rows(out, scale)

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
        """With ``shifts_P``, ``out`` are those of this rank's heads [N, H / P, d]. The heads of rank r are written to
        the same places shifted by ``shifts_P[r]`` times 16 bytes, which may be on another GPU."""
        self._launch(qkv_N3D, weights, rope, eps, out, rows_N, shifts_P)

    def store_rows(self, rows_N: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        """Keys and values must have rows of as many bytes and the same strides."""
        (k, k_into), (v, v_into) = keys, values
        rows = [part.flatten(1).view(torch.uint8) for part in (k, v, k_into, v_into)]
        numbers = [number for part in rows for number in (part.storage_offset(), part.stride(0), part.shape[1])]
        if all(number % _WORD.itemsize == 0 for number in numbers):
            rows = [part.view(_WORD) for part in rows]
        words = rows[0].shape[1]
        _store_rows[(len(rows_N), 2)](
            *rows, rows_N, *(part.stride(0) for part in rows[::2]), WORDS=words, BLOCK=triton.next_power_of_2(words)
        )

    def head_norm(self, q_ND: Tensor, weight: Tensor, eps: float, heads: int) -> Tensor:
        out = torch.empty_like(q_ND).unflatten(-1, (heads, -1))
        self._launch(q_ND, (weight, weight), None, eps, (out, out, out), None, None)
        return out

    def _launch(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor] | None,
        eps: float,
        out: tuple[Tensor, ...],
        rows_N: Tensor | None,
        shifts_P: Tensor | None,
    ) -> None:
        rows, *_, head_dim = out[0].shape
        rotate = rope is not None
        parts = 3 if rotate else 1
        width = x.shape[-1] // parts
        if shifts_P is not None:
            peers = len(shifts_P)
        else:
            peers = out[0].shape[1] if out[0].dim() == 4 else 1
        block = hadamard_block(head_dim) if out[1].dtype == FP8 else 1
        _project_heads[(rows, parts)](
            x,
            *weights,
            *(rope or weights),
            *out,
            x if shifts_P is None else shifts_P,
            x if rows_N is None else rows_N,
            *(tensor.stride(0) for tensor in out),
            *(tensor.stride(1) for tensor in out),
            eps,
            D=width,
            PEER=width // peers,
            SHIFTS=0 if shifts_P is None else peers,
            HAS_ROWS=rows_N is not None,
            PAIRS=head_dim // 2,
            BLOCK=triton.next_power_of_2(width),
            ROTATE=rotate,
            PARTS=parts,
            HADAMARD=block,
            HADAMARD_SCALE=block**-0.5,
            num_warps=_warps(width),
        )
