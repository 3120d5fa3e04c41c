"""The device's highest rate for linears and for attention, each measured alone at the shapes of a chunk.

A chunk consists almost only of these two kinds of kernel, so their rates bound its time from below.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lingbot_rt.bench.flops import ChunkShape, Flops, block_flops
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.models.attention import attend
from lingbot_rt.models.quantize import FP8, product_on, quantize_rows, to_float8

_ROUNDS = 3
_ROUND_S = 0.2  # long enough for the accelerator's clock to settle under load
_MAX_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Roofline:
    """TFLOP/s in the DiT's own dtype, with its own attention kernel."""

    linears: float
    attention: float

    def seconds(self, work: Flops) -> float:
        """The shortest time in which ``work`` can run at these rates."""
        return (work.linears / self.linears + work.attention / self.attention) / 1e12


@torch.inference_mode()
def measure_roofline(pipeline: Pipeline, shape: ChunkShape) -> Roofline:
    """Times the four linear shapes of a block, and self-attention of a chunk's queries over the window's keys."""
    config, device = pipeline.dit.config, pipeline.device

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=pipeline.dtype, device=device)

    dim, ffn = config.dim, config.ffn_dim
    pairs = [(random(shape.tokens, k), random(n, k)) for k, n in ((dim, 3 * dim), (dim, dim), (dim, ffn), (ffn, dim))]
    linear_flops = sum(2 * x.shape[0] * weight.numel() for x, weight in pairs)
    if pipeline.model_info.quantization == "fp8":
        linears_s = seconds_of(_fp8_products(pairs), device)
    else:
        linears_s = seconds_of(lambda: [F.linear(x, weight) for x, weight in pairs], device)

    heads = (config.num_attention_heads, config.attention_head_dim)
    q = random(1, shape.tokens, *heads)
    k, v = random(1, shape.keys, *heads), random(1, shape.keys, *heads)
    if pipeline.kv_cache_dtype == FP8:
        k, v = to_float8(k), to_float8(v)
    attention_s = seconds_of(lambda: attend(q, k, v, pipeline.dit.attention_backend), device)
    attention_flops = block_flops(config, shape.tokens, shape.keys).self_attention
    return Roofline(linears=linear_flops / linears_s / 1e12, attention=attention_flops / attention_s / 1e12)


def _fp8_products(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
    """The fp8 products without the quantization of their inputs, which compiled code fuses into earlier kernels."""
    dtype, product = pairs[0][0].dtype, product_on(pairs[0][0].device)
    quantized = [(*quantize_rows(x), *quantize_rows(weight)) for x, weight in pairs]
    operands = [(x, x_scale, weight, scale.T.contiguous(), dtype) for x, x_scale, weight, scale in quantized]
    return lambda: [product(*each) for each in operands]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call: the median of three rounds of many calls, after one warm-up call."""

    def round_of(repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / repeats

    round_of(1)
    repeats = max(1, min(int(_ROUND_S / round_of(1)), _MAX_REPEATS))
    return statistics.median(round_of(repeats) for _ in range(_ROUNDS))
