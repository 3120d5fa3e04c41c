"""The Triton kernels against plain torch, and a session on them against the reference."""

from __future__ import annotations

import os

import pytest
import torch

from lingbot_rt.models.fused_blocks import Affine, PlainOps, Residual
from lingbot_rt.models.quantize import FP8
from lingbot_rt.parallel.ulysses import Packing
from tests.models.test_fused import relative_rms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""With this variable Triton's kernels run on a CPU, slowly."""

FP8_NEAR = 0.2 if INTERPRETED else 2.5e-2
"""A few values round the other way. The interpreter rounds to fp8 wrongly."""


@pytest.fixture
def triton_ops():
    pytest.importorskip("triton")
    from lingbot_rt.models.fused_kernels import TritonOps

    return TritonOps()


@pytest.mark.skipif(INTERPRETED and torch.cuda.is_available(), reason="the interpreter is for CPUs")
@(lambda test: test if INTERPRETED else pytest.mark.gpu(test))
@pytest.mark.parametrize(("width", "heads"), [(48, 3), (256, 4), (5120, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_the_plain_operations(triton_ops, dtype, width, heads):
    """Every kernel, with and without its parts, on rows that are views of larger tensors where that is allowed."""
    device = "cpu" if INTERPRETED else "cuda"
    plain, rows = PlainOps(), 5

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(kind)

    near = 1e-5 if dtype == torch.float32 else 1e-2
    gain, shift, gate = (draw(width, kind=torch.float32) for _ in range(3))
    camera = (draw(rows, width), draw(rows, width))
    residuals = (None, Residual(draw(rows, width)), Residual(draw(rows, width), gate, camera))
    for residual in residuals:
        for affine in (Affine(gain, shift, plus_one=True), Affine(gain.to(dtype), shift.to(dtype))):
            for target in ("same", "fp8") if width % 16 == 0 else ("same",):
                x = draw(rows, width)
                mine, theirs = x.clone(), x.clone()
                got = triton_ops.residual_norm(mine, residual, affine, 1e-6, target)
                expected = plain.residual_norm(theirs, residual, affine, 1e-6, target)
                assert relative_rms(mine, theirs) <= near
                assert_close(got, expected, near)
    x = draw(rows, width)
    for activation, plus in (("none", None), ("gelu", None), ("silu", None), ("none", draw(rows, width))):
        assert_close(triton_ops.quantize(x, activation, plus), plain.quantize(x, activation, plus), near)
    weights = (draw(width), draw(width))
    head_dim = width // heads
    rope = (draw(rows, head_dim // 2, kind=torch.float32), draw(rows, head_dim // 2, kind=torch.float32))
    qkv = draw(rows, 3 * width)
    for kinds in ((dtype, dtype, dtype), (dtype, FP8, FP8), (FP8, FP8, FP8)):
        pair = [[torch.zeros(rows, heads, head_dim, device=device).to(kind) for kind in kinds] for _ in range(2)]
        triton_ops.project_heads(qkv, weights, rope, 1e-6, tuple(pair[0]))
        plain.project_heads(qkv, weights, rope, 1e-6, tuple(pair[1]))
        for got, expected, kind in zip(*pair, kinds, strict=True):
            # Mixed values pass through float16.
            assert relative_rms(got.float(), expected.float()) <= (max(near, 1e-3) if kind == dtype else FP8_NEAR)
        # k and v into rows of a window, some of them into none.
        into = torch.tensor([4, -1, 0, 7, 2], device=device)
        q = torch.empty_like(pair[0][0])
        windows = [[torch.zeros(8, heads, head_dim, device=device).to(kind) for kind in kinds[1:]] for _ in range(3)]
        triton_ops.project_heads(qkv, weights, rope, 1e-6, (q, *windows[0]), into)
        assert torch.equal(q.view(torch.uint8), pair[0][0].view(torch.uint8))
        plain.project_heads(qkv, weights, rope, 1e-6, (q, *windows[1]), into)
        triton_ops.store_rows(into, *zip(pair[0][1:], windows[2], strict=True))
        for got, expected, stored, kind in zip(*windows, kinds[1:], strict=True):
            assert relative_rms(got.float(), expected.float()) <= (max(near, 1e-3) if kind == dtype else FP8_NEAR)
            assert torch.equal(stored.view(torch.uint8), got.view(torch.uint8))
        # As several ranks send them: the heads of each rank apart, and q, k and v of a row behind each other.
        ranks = 3 if heads == 3 else 2
        packing = Packing(kinds, heads // ranks, head_dim)
        sent = packing.parts(torch.zeros(ranks, rows, packing.nbytes, dtype=torch.uint8, device=device))
        triton_ops.project_heads(qkv, weights, rope, 1e-6, tuple(part.transpose(0, 1) for part in sent))
        for got, whole in zip(sent, pair[0], strict=True):
            assert torch.equal(got.transpose(0, 1).flatten(1, 2).float(), whole.float())
        # As rank 1 writes them into the memory of each: the same places, so many times 16 bytes away.
        places = torch.zeros(ranks, rows, packing.nbytes, dtype=torch.uint8, device=device)
        shifts = (torch.arange(ranks, device=device) - 1) * (rows * packing.nbytes // 16)
        triton_ops.project_heads(qkv, weights, rope, 1e-6, tuple(packing.parts(places[1])), None, shifts)
        for got, expected in zip(packing.parts(places), sent, strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    got = triton_ops.head_norm(x, weights[0], 1e-6, heads)
    assert relative_rms(got, plain.head_norm(x, weights[0], 1e-6, heads)) <= near


@pytest.mark.skipif(INTERPRETED and torch.cuda.is_available(), reason="the interpreter is for CPUs")
@(lambda test: test if INTERPRETED else pytest.mark.gpu(test))
@pytest.mark.parametrize(("ranks", "tokens", "features"), [(3, 7, 8), (2, 4, 4), (4, 11, 2560)])
def test_rows_are_written_to_the_ranks_whose_tokens_they_are(triton_ops, ranks, tokens, features):
    """Each rank writes its heads of all tokens; every rank then has all heads of its own tokens, and nothing else."""
    from lingbot_rt.models.fused_kernels import push_rows

    device = "cpu" if INTERPRETED else "cuda"
    counts = [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]
    sent = torch.randn(ranks, tokens, features, device=device).bfloat16()
    places = torch.zeros(ranks, max(counts), ranks, features, dtype=torch.bfloat16, device=device)
    for rank in range(ranks):
        shifts = (torch.arange(ranks, device=device) - rank) * (places[0].nbytes // 16)
        push_rows(sent[rank], places[rank][:, rank], shifts)
    for rank, count in enumerate(counts):
        start = sum(counts[:rank])
        assert torch.equal(places[rank, :count], sent[:, start : start + count].transpose(0, 1))
        assert not places[rank, count:].any()


def assert_close(got, expected, near: float) -> None:
    """Tensors, or fp8 rows, of which a few values may round the other way."""
    if isinstance(expected, torch.Tensor):
        assert relative_rms(got, expected) <= near
        return
    assert relative_rms(got.scale_M1, expected.scale_M1) <= near
    assert (
        relative_rms(got.values_MK.float() * got.scale_M1, expected.values_MK.float() * expected.scale_M1) <= FP8_NEAR
    )
