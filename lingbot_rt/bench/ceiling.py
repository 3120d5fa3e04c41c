"""What the device gives to the two kinds of kernel that a chunk is made of, alone and at the chunk's own shapes."""

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
from lingbot_rt.models.quantize import product_on, quantize_rows

_ROUNDS = 3
_ROUND_S = 0.2  # long enough that the clock of an accelerator settles under load
_MOST_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Ceiling:
    """TFLOP/s, measured in the DiT's own precision with its own attention kernel."""

    linears: float
    attention: float

    def seconds(self, work: Flops) -> float:
        """The least time that ``work`` can take at these rates."""
        return (work.linears / self.linears + work.attention / self.attention) / 1e12


@torch.inference_mode()
def measure_ceiling(pipeline: Pipeline, shape: ChunkShape) -> Ceiling:
    """A block's four kinds of linear, and self-attention of the chunk's queries over its keys."""
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
    attention_s = seconds_of(lambda: attend(q, k, v, pipeline.dit.attention_backend), device)
    attention_flops = block_flops(config, shape.tokens, shape.keys).self_attention
    return Ceiling(linears=linear_flops / linears_s / 1e12, attention=attention_flops / attention_s / 1e12)


def _fp8_products(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
    """The products alone: on a device the rounding to fp8 is part of what comes before them."""
    dtype, product = pairs[0][0].dtype, product_on(pairs[0][0].device)
    rounded = [(*quantize_rows(x), *quantize_rows(weight)) for x, weight in pairs]
    ready = [(x, weight, x_scale, scale.T.contiguous(), dtype) for x, x_scale, weight, scale in rounded]
    return lambda: [product(*operands) for operands in ready]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median of three rounds of many, after one to warm up."""

    def round_of(repeats: int) -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begun) / repeats

    round_of(1)
    repeats = max(1, min(int(_ROUND_S / round_of(1)), _MOST_REPEATS))
    return statistics.median(round_of(repeats) for _ in range(_ROUNDS))
