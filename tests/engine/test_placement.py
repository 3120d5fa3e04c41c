"""Offload: whole networks, and a DiT of which two blocks at a time are on the device."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from lingbot_rt.engine.placement import StreamedBlocks
from lingbot_rt.models.checkpoint import load_text_encoder, open_checkpoint
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.fused_blocks import PlainOps
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import quantize_linears

CPU = torch.device("cpu")
TINY = DiTConfig(
    num_layers=4, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=32, text_len=8, freq_dim=32
)


def tiny_dit(num_layers: int) -> CausalDiT:
    torch.manual_seed(num_layers)
    dit = CausalDiT(dataclasses.replace(TINY, num_layers=num_layers)).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.2)
    return dit


def two_chunks(dit: CausalDiT) -> list[torch.Tensor]:
    """Flow and window of two chunks with text, camera and context pass."""
    torch.manual_seed(0)
    cache = KVCache(
        num_layers=dit.config.num_layers,
        num_heads=2,
        head_dim=16,
        tokens_per_frame=4,
        sink_frames=3,
        window_frames=6,
        dtype=torch.float32,
        device=CPU,
    )
    found = []
    text_kv = dit.text_kv(torch.randn(1, 8, 32))
    for chunk in range(2):
        camera = dit.camera_modulation(torch.randn(1, 384, 3, 4, 4))
        x = torch.randn(1, 36, 3, 4, 4)
        found.append(dit(x, 900.0, text_kv, camera, cache, 3 * chunk))
        assert dit(x, 0.0, text_kv, camera, cache, 3 * chunk, commit=True) is None
        found += [side.clone() for layer in range(dit.config.num_layers) for side in cache.view(layer)]
    return found


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_blocks_compute_the_same(num_layers, fp8):
    """Bit for bit what the resident DiT gives, for even and odd numbers of blocks, after passes that ended early."""
    resident = tiny_dit(num_layers)
    if fp8:
        for block in resident.blocks:
            quantize_linears(block)
    streamed = copy.deepcopy(resident)
    streamed.blocks = StreamedBlocks(streamed.blocks, CPU)
    for got, expected in zip(two_chunks(streamed), two_chunks(resident), strict=True):
        assert torch.equal(got, expected)


def test_two_blocks_are_there_and_the_next_one_comes_early():
    """While a block works its buffer is its own, the other one takes the next block; after the last comes the first."""
    blocks = StreamedBlocks(tiny_dit(4).blocks, CPU)
    assert blocks.resident == (None, None)
    seen = [blocks.resident for _ in blocks]
    assert seen == [(0, 1), (2, 1), (2, 3), (0, 3)]
    assert [blocks.resident for _ in blocks] == [(0, 1), (2, 1), (2, 3), (0, 3)]
    odd = StreamedBlocks(tiny_dit(3).blocks, CPU)
    assert [odd.resident for _ in odd] == [(0, 1), (2, 1), (2, 1)]


def test_the_device_holds_two_blocks():
    """All parameters of all blocks are views of two buffers; the host has every block's bytes once."""
    dit = tiny_dit(4)
    block_bytes = sum(parameter.nbytes for parameter in dit.blocks[0].parameters())
    blocks = StreamedBlocks(dit.blocks, CPU)
    storages = {parameter.untyped_storage().data_ptr() for parameter in blocks.parameters()}
    assert len(storages) == 2
    assert block_bytes * 4 <= blocks.bytes_per_forward <= block_bytes * 4 * 1.5  # small ones, each begins at 256 bytes


def test_streamed_blocks_share_a_compilation():
    """Compiled, the blocks of both buffers run the same code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    resident = tiny_dit(4)
    streamed = copy.deepcopy(resident)
    streamed.blocks = StreamedBlocks(streamed.blocks, CPU)
    streamed.compile_blocks("aot_eager")
    with torch.inference_mode():
        for got, expected in zip(two_chunks(streamed), two_chunks(resident), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("quantized", [False, True])
def test_streamed_blocks_with_fused_operations(quantized):
    """Nothing of a block is used after its buffer holds the next: bit for bit the resident blocks."""
    resident = tiny_dit(4)
    if quantized:
        for block in resident.blocks:
            quantize_linears(block)
    resident.fuse_blocks(PlainOps())
    streamed = copy.deepcopy(resident)
    streamed.blocks = StreamedBlocks(streamed.blocks, CPU)
    with torch.inference_mode():
        for got, expected in zip(two_chunks(streamed), two_chunks(resident), strict=True):
            assert torch.equal(got, expected)


def test_a_streamed_text_encoder_computes_the_same(golden):
    """Its layers on the host, two at a time on the device: bit for bit the embeddings of the resident encoder."""
    folder = open_checkpoint(str(golden("e2e/model")))
    resident, streamed = (load_text_encoder(folder, torch.float32, CPU) for _ in range(2))
    streamed.offload(CPU, lambda layers: StreamedBlocks(layers, CPU))
    assert isinstance(streamed._encoder.encoder.block, StreamedBlocks)
    with torch.inference_mode():
        for prompt in ("A quiet street.", "Another street, at night.", "A quiet  street."):
            assert torch.equal(streamed.encode(prompt), resident.encode(prompt))
