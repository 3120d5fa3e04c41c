"""Attention kernels, in bfloat16 and over a window in fp8, and a session of the 14B on a small card."""

from __future__ import annotations

import pytest
import torch

from lingbot_rt.bench.pipeline import SyntheticSession, Workload
from lingbot_rt.bench.random_model import random_pipeline
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.memory import require_room
from lingbot_rt.models.attention import attend, available_backends
from lingbot_rt.models.quantize import hadamard, to_float8
from lingbot_rt.shapes import FrameSize
from tests.models.test_fused import relative_rms

from .conftest import DEVICE

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def drawn(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    shapes = ((1, queries, 4, 128), (1, keys, 4, 128), (1, keys, 4, 128))
    q, k, v = (torch.randn(shape, device=DEVICE, generator=generator).to(BF16) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash", "fa2", "fa3", "fa4"])
def test_every_kernel_that_runs_is_softmax(backend):
    """Within bfloat16's rounding of float32, keys in a view of a longer window included."""
    if available_backends(DEVICE, BF16)[backend] != "ok":
        pytest.skip(f"{backend} does not run here")
    q, k, v = drawn(300, 2000)
    expected = attend(q.float(), k[:, :1500].float(), v[:, :1500].float(), "math")
    assert relative_rms(attend(q, k[:, :1500], v[:, :1500], backend), expected) <= 6e-3


@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "fa3"])
def test_a_window_in_fp8(backend):
    """Keys and values in fp8 cost a few percent, whether the kernel computes in fp8 (fa3) or in bfloat16."""
    if available_backends(DEVICE, BF16)[backend] != "ok":
        pytest.skip(f"{backend} does not run here")
    q, k, v = drawn(300, 2000)
    got = attend(hadamard(q), to_float8(hadamard(k)), to_float8(v), backend)
    assert got.dtype == BF16
    assert 1e-3 <= relative_rms(got, attend(q.float(), k.float(), v.float(), "math")) <= 0.08


def test_queries_in_fp8_between_others():
    """Queries as they come from other ranks, with keys and values between them, give what they give alone."""
    if available_backends(DEVICE, BF16)["fa3"] != "ok":
        pytest.skip("fa3 does not run here")
    q, k, v = (to_float8(x) for x in drawn(300, 2000))
    between = torch.zeros(1, 300, 3, 4, 128, dtype=torch.uint8, device=DEVICE).view(q.dtype)
    between[:, :, 0].copy_(q)
    assert torch.equal(attend(between[:, :, 0], k, v, "fa3"), attend(q, k, v, "fa3"))


def test_the_14b_on_a_card_of_32_gb():
    """fp8 linears and window, 640x352, window 12: eight chunks with sound frames in 32 x 10^9 bytes."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    if total < 33e9:
        pytest.skip("the card is smaller")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(32e9 / total, DEVICE)
    try:
        config = ServeConfig(
            model_path="lingbot-world-fast",
            device="cuda",
            compile="auto",
            quantization="fp8",
            kv_cache_dtype="fp8",
        )
        pipeline = random_pipeline(config)
        plan = Workload(size=FrameSize(640, 352), sink_frames=3, window_frames=12).session_plan(pipeline)
        require_room(pipeline, plan)
        session = SyntheticSession(pipeline, plan)
        frames = [session.step().result.num_frames for _ in range(8)]
        assert frames == [9] + [12] * 7
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert torch.cuda.max_memory_reserved(DEVICE) <= 32e9
