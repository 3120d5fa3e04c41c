"""The choice of the attention kernel."""

from __future__ import annotations

import pytest
import torch

from lingbot_rt.errors import ConfigError
from lingbot_rt.models.attention import BACKENDS, WindowAttention, attend, available_backends, require_backend
from lingbot_rt.models.kv_cache import KVCache

from .conftest import CPU, Rollout, new_cache


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_backends_agree(backend):
    """Every kernel that runs on any CPU gives softmax(q k^T / sqrt(D)) v."""
    q, k, v = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64).unbind(0)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(8**0.5).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    assert (attend(q, k, v, backend) - expected).abs().max() <= 1e-12


def test_what_runs_here_is_known():
    """Each backend is found to run or is said why not; the defaults run everywhere."""
    found = available_backends(CPU)
    assert set(found) == set(BACKENDS)
    assert found["auto"] == found["sdpa"] == found["math"] == "ok"
    assert found["cudnn"] != "ok"


def test_a_backend_that_does_not_run_is_refused():
    """Asking for cuDNN on a CPU is one line that names the backends that run."""
    require_backend("math", CPU)
    with pytest.raises(ConfigError, match=r"--attention-backend cudnn does not run on cpu .*here run: auto, sdpa"):
        require_backend("cudnn", CPU)


def test_window_attention_can_be_replaced(dit, arrays):
    """Sequence parallelism's seam: an object in its place sees every layer's q, k, v and the context pass's store."""
    calls = []

    class HeadsInTwoHalves(WindowAttention):
        """What two ranks would do: each half of the heads with a window of its own."""

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
