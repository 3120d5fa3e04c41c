"""Operation counts: the known figures of the 14B at 832x480, and torch's own counter on a tiny model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lingbot_rt.bench.flops import ChunkShape, block_flops, chunk_flops
from lingbot_rt.engine.memory import window_bytes
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.shapes import FrameSize

TERA = 1e12
FULL = ChunkShape(FrameSize(832, 480), latent_frames=3, visible_frames=18, num_steps=4)


def test_the_14b_at_its_size():
    """TFLOP per forward: linears 112, self-attention over 28,080 keys 107.6, text 2. Per chunk: camera 39."""
    forward = block_flops(DiTConfig(), FULL.tokens, FULL.keys).times(40)
    assert (FULL.tokens, FULL.keys) == (4680, 28_080)
    assert forward.linears / TERA == pytest.approx(112, abs=0.5)
    assert forward.self_attention / TERA == pytest.approx(107.6, abs=0.1)
    assert forward.cross_attention / TERA == pytest.approx(2, abs=0.1)
    assert chunk_flops(DiTConfig(), FULL).camera.total / TERA == pytest.approx(39, abs=0.5)


def test_the_window_of_the_14b():
    """A latent frame of K/V takes 1.278 GB, a window of 18 takes 23.0 GB."""
    per_frame = window_bytes(DiTConfig(), FULL.size, 1, torch.bfloat16)
    assert per_frame == 819_200 * 1560
    assert per_frame / 1e9 == pytest.approx(1.278, abs=0.0005)
    assert 18 * per_frame / 1e9 == pytest.approx(23.0, abs=0.05)


def test_the_first_chunk_attends_to_itself_alone():
    """Chunk 0 has a sixth of the self-attention of a full window of 18, and the same linears."""
    first = chunk_flops(DiTConfig(), ChunkShape(FULL.size, 3, 3, 4)).denoise
    full = chunk_flops(DiTConfig(), FULL).denoise
    assert first.self_attention * 6 == pytest.approx(full.self_attention)
    assert first.linears == full.linears


def test_guidance_doubles_the_forwards_and_not_the_camera():
    """With guidance there are two forwards per step and two context passes, but one camera pass."""
    one = chunk_flops(DiTConfig(), FULL)
    two = chunk_flops(DiTConfig(), ChunkShape(FULL.size, 3, 18, 4, branches=2))
    assert two.dit.total == pytest.approx(2 * one.dit.total)
    assert two.camera == one.camera


@pytest.mark.parametrize("commit", [False, True])
def test_a_forward_does_what_was_counted(commit):
    """torch counts the same operations in a forward, apart from patch embedding, timestep and head."""
    config = DiTConfig(num_layers=3, num_attention_heads=2, attention_head_dim=12, ffn_dim=64, text_dim=32, text_len=16)
    shape = ChunkShape(FrameSize(64, 64), latent_frames=3, visible_frames=3, num_steps=1)
    with torch.inference_mode():
        dit = CausalDiT(config)
        dit.attention_backend = "math"  # plain matrix products, which the counter knows on every device
        cache = KVCache(
            num_layers=3,
            num_heads=2,
            head_dim=12,
            tokens_per_frame=16,
            sink_frames=3,
            window_frames=6,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        text = dit.text_kv(torch.randn(1, 16, 32))
        with FlopCounterMode(display=False) as counter:
            dit(torch.randn(1, 36, 3, 8, 8), 500.0, text, None, cache, 0, commit=commit)
    dim = config.dim
    around = 2 * shape.tokens * 144 * dim + 2 * 256 * dim + 2 * dim * dim + 2 * dim * 6 * dim
    head = 0 if commit else 2 * shape.tokens * dim * 64
    counted = chunk_flops(config, shape)
    expected = counted.context if commit else counted.denoise
    assert counter.get_total_flops() - around - head == expected.total
