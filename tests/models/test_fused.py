"""The fused path of the DiT's blocks: the reference's roll-outs again, and each kernel against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch

from lingbot_rt.models.attention import attend
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.fused_blocks import PlainOps
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import FP8, hadamard, quantize_linears

from .conftest import CPU, Rollout, new_cache
from .test_dit import TOLERANCE, worst


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def fused(dit) -> CausalDiT:
    fused = copy.deepcopy(dit)
    fused.fuse_blocks(PlainOps())
    return fused


def test_the_reference_rollout(fused, arrays):
    """Fused blocks give the reference's flow and latents over five chunks, with the window sliding."""
    expected = arrays("dit/rollout_main_outputs")
    rollout = Rollout(fused, arrays("dit/rollout_main_inputs"), new_cache(fused))
    for chunk in range(5):
        assert worst(rollout.step(), expected["latents"][chunk]) <= TOLERANCE
        assert worst(torch.stack(rollout.flows), expected["model_out"][chunk]) <= TOLERANCE


def random_dit() -> CausalDiT:
    torch.manual_seed(3)
    config = DiTConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=32, ffn_dim=128, in_channels=8, out_channels=4,
        text_dim=16, text_len=8, freq_dim=16,
    )  # fmt: skip
    dit = CausalDiT(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    return dit


def window(dit: CausalDiT, dtype: torch.dtype, heads: int = 2) -> KVCache:
    return KVCache(
        num_layers=2, num_heads=heads, head_dim=dit.config.attention_head_dim, tokens_per_frame=4, sink_frames=1,
        window_frames=4, dtype=dtype, device=CPU,
    )  # fmt: skip


def chunks(dit: CausalDiT, cache: KVCache) -> torch.Tensor:
    """Flows of four chunks with camera and prompt, a context pass after each. The second's slots are in two runs.
    Before the last one the first, of which one frame is left, and the third are computed again."""
    generator = torch.Generator().manual_seed(5)
    flows, done = [], []
    for chunk in range(4):
        x = torch.randn(1, 8, 2, 4, 4, generator=generator)
        text_kv = dit.text_kv(torch.randn(1, 8, 16, generator=generator))
        camera = dit.camera_modulation(torch.randn(1, 384, 2, 4, 4, generator=generator)) if chunk else None
        for past in (0, 2) if chunk == 3 else ():
            assert dit(done[past], 0.0, text_kv, camera, cache, 2 * past, commit=True) is None
        flows.append(dit(x, 700.0, text_kv, camera, cache, 2 * chunk))
        done.append(x)
        assert dit(x, 0.0, text_kv, camera, cache, 2 * chunk, commit=True) is None
    return torch.cat(flows)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, FP8])
def test_fused_blocks_are_the_plain_ones(quantized, kept):
    """The same flows and window, with linears in fp8 or not, and the window in fp8 or not."""
    dit = random_dit()
    if quantized:
        for block in dit.blocks:
            quantize_linears(block)
    plain_cache, cache = window(dit, kept), window(dit, kept)
    plain = chunks(dit, plain_cache)
    dit.fuse_blocks(PlainOps())
    got = chunks(dit, cache)
    # Values at the border of two fp8 steps may round either way.
    limit = 1e-2 if quantized or kept != torch.float32 else 1e-5
    assert relative_rms(got, plain) <= limit
    for layer in range(2):
        for ours, theirs in zip(cache.view(layer), plain_cache.view(layer), strict=True):
            assert ours.dtype == kept
            assert relative_rms(ours.float(), theirs.float()) <= limit


def test_a_window_in_fp8_is_close_and_half_as_large():
    """Three significant bits: flows within 3 % of those with a float32 window; values beyond 448 are kept finite."""
    dit = random_dit()
    exact, rounded = window(dit, torch.float32), window(dit, FP8)
    assert rounded.nbytes * 4 == exact.nbytes
    assert 1e-4 <= relative_rms(chunks(dit, rounded), chunks(dit, exact)) <= 0.03
    v = torch.full((1, 8, 2, 32), 1000.0)
    rounded.begin(0, 2)
    rounded.write(0, v, -v)
    assert rounded.view(0)[1][:, :8].float().eq(-448).all()
    assert rounded.view(0)[0].float().abs().max() == 448


def test_mixed_keys_keep_their_products():
    """Products of queries and keys stay, and one large dimension is shared out over its block."""
    q, k = torch.randn(2, 6, 2, 96).unbind(0)
    assert worst(hadamard(q) @ hadamard(k).mT, q @ k.mT) <= 1e-4
    one = torch.zeros(64)
    one[5] = 8.0
    assert hadamard(one).abs().max() <= 8 / 32**0.5 + 1e-6
    assert torch.equal(hadamard(one[:12]), one[:12])


def test_attention_over_keys_in_fp8(monkeypatch):
    """Kernels compute in the query's type, whatever that of the window. fa3 gets all three in fp8."""
    q, k, v = torch.randn(3, 1, 6, 2, 16).unbind(0)
    rounded = k.to(FP8), v.to(FP8)
    half = k.bfloat16(), v.bfloat16()
    for backend in ("sdpa", "math"):
        for kept in (rounded, half):
            assert torch.equal(attend(q, *kept, backend), attend(q, *(x.float() for x in kept), backend))
    seen = []
    monkeypatch.setattr("lingbot_rt.models.attention._flash_attention", lambda name: lambda *qkv: seen.append(qkv))
    attend(q, *rounded, "fa3")
    attend(q.to(FP8), *rounded, "fa3")
    assert [[x.dtype for x in qkv] for qkv in seen] == [[FP8] * 3] * 2
