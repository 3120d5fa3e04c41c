"""The choice of the attention kernel."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from lingbot_rt.errors import ConfigError
from lingbot_rt.models.attention import (
    BACKENDS,
    WindowAttention,
    attend,
    available_backends,
    require_backend,
    resolve_backend,
    text_backend,
)
from lingbot_rt.models.kv_cache import KVCache

from .conftest import CPU, Rollout, new_cache


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_backends_agree(backend):
    """Every kernel that runs on any CPU gives softmax(q k^T / sqrt(D)) v."""
    q, k, v = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64).unbind(0)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(8**0.5).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    assert (attend(q, k, v, backend) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4"])
def test_flash_attention_packages(monkeypatch, backend, with_sums):
    """A package's function gets B N H D tensors, and may return the softmax's sums beside its output."""
    module = types.ModuleType("package")

    def flash_attn_func(q, k, v):
        out = attend(q, k, v, "math")
        return (out, None) if with_sums else out

    module.flash_attn_func = flash_attn_func
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind(0)
    assert available_backends(CPU, torch.float32)[backend] != "ok"
    for part in ("flash_attn", "flash_attn.cute", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, part, module)
    assert torch.equal(attend(q, k, v, backend), attend(q, k, v, "math"))
    assert available_backends(CPU, torch.float32)[backend] == "ok"


def test_choice_of_the_kernel(monkeypatch):
    """auto is cuDNN in half precision on Hopper and torch's choice elsewhere; text attention never uses a package."""
    device = torch.device("cuda", 0)
    resolve_backend.cache_clear()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert resolve_backend("auto", device, torch.bfloat16) == "cudnn"
    assert resolve_backend("auto", device, torch.float32) == "sdpa"
    assert text_backend("fa3", device, torch.bfloat16) == "cudnn"
    assert text_backend("math", device, torch.bfloat16) == "math"
    resolve_backend.cache_clear()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    assert resolve_backend("auto", device, torch.bfloat16) == "sdpa"
    resolve_backend.cache_clear()
    assert resolve_backend("auto", CPU, torch.bfloat16) == "sdpa"
    assert resolve_backend("flash", CPU, torch.float32) == "flash"


def test_available_backends():
    """Every backend is listed as ok or with its error; the defaults run everywhere."""
    found = available_backends(CPU, torch.float32)
    assert set(found) == set(BACKENDS)
    assert found["auto"] == found["sdpa"] == found["math"] == "ok"
    assert found["cudnn"] != "ok"


def test_a_backend_that_does_not_run_is_refused():
    """Asking for cuDNN on a CPU is one line that names the backends that run."""
    require_backend("math", CPU, torch.float32)
    with pytest.raises(
        ConfigError, match=r"--attention-backend cudnn does not run on cpu in float32 .*use one of: auto, sdpa"
    ):
        require_backend("cudnn", CPU, torch.float32)


def test_window_attention_can_be_replaced(dit, arrays):
    """A replacement, as for sequence parallelism, gets every layer's q, k, v and the context pass's last K/V."""
    calls = []

    class HeadsInTwoHalves(WindowAttention):
        """As two ranks do it: each half of the heads has its own window."""

        def __init__(self) -> None:
            self.halves = [
                KVCache(
                    num_layers=2,
                    num_heads=2,
                    head_dim=32,
                    tokens_per_frame=24,
                    sink_frames=3,
                    window_frames=9,
                    dtype=torch.float32,
                    device=CPU,
                )
                for _ in range(2)
            ]

        def begin(self, start_frame, num_frames):
            for half in self.halves:
                half.begin(start_frame, num_frames)

        def store(self, k, v, cache, layer):
            calls.append("store")
            for half, cut in zip(cache.halves, (slice(0, 2), slice(2, 4)), strict=True):
                half.write(layer, k[:, :, cut], v[:, :, cut])

        def __call__(self, q, k, v, cache, layer, backend):
            calls.append("attend")
            self.store(k, v, cache, layer)
            cuts = (slice(0, 2), slice(2, 4))
            parts = [
                attend(q[:, :, cut], *half.view(layer), backend) for half, cut in zip(cache.halves, cuts, strict=True)
            ]
            return torch.cat(parts, dim=2)

    inputs = arrays("dit/rollout_main_inputs")
    expected = [Rollout(dit, inputs, new_cache(dit)).step()]
    halves, own = HeadsInTwoHalves(), dit.window_attention
    dit.window_attention = halves
    try:
        got = Rollout(dit, inputs, halves).step()
    finally:
        dit.window_attention = own
    assert (got - expected[0]).abs().max() <= 1e-6
    assert calls.count("attend") == 4 * 2 + 1
