"""A decode split by width gives the pixels of the whole decode: the real decoder over gloo, one thread per rank."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor

from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.parallelize import parallelize_decoder
from lingbot_rt.parallel.vae_width import WidthShards
from tests.parallel.conftest import ThreadRank

TOLERANCE = 1e-5
FRAMES = 5
"""Latent frames: the first has no features behind it, the second one frame of them, the later ones two."""


WAN_22 = {
    "z_dim": 12,
    "dim_mult": [1, 2, 4, 4],
    "temperal_downsample": [False, True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "latents_mean": [0.1] * 12,
    "latents_std": [1.5] * 12,
}


def latents(vae: StreamingVAE, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, vae.z_dim, FRAMES, height, width, generator=generator)


@torch.inference_mode()
def decoded(decode, vae: StreamingVAE, stream: Tensor) -> Tensor | None:
    features = vae.new_features()
    frames = [decode(latent, features) for latent in stream.split(1, dim=2)]
    return None if frames[0] is None else torch.cat(frames, dim=2)


LATE_S = 0.0005


def on_rank(rank: int, world: int, store: dist.Store, plain: AutoencoderKLWan, streams: list[Tensor]):
    # The last rank is late for every exchange. A rank that ran ahead would mix up the exchanges of two layers.
    group = ThreadRank(rank, world, store, LATE_S if rank == world - 1 else 0.0)
    vae = StreamingVAE(copy.deepcopy(plain))
    decode = parallelize_decoder(vae, group, "width")
    return [decoded(decode, vae, stream) for stream in streams], group.exchanged


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("generation", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
def test_shards_make_the_whole(world, generation):
    """Even widths, uneven ones, and one with fewer columns than four ranks: rank 0's pixels equal the whole decode's to
    1e-5 over five latent frames, and the other ranks have none. Every rank, one of them late, takes part in the same
    exchanges in the same order."""
    torch.manual_seed(1)
    plain = AutoencoderKLWan.from_config({"base_dim": 8, "num_res_blocks": 1} | generation)
    vae = StreamingVAE(copy.deepcopy(plain))
    streams = [latents(vae, 4, width) for width in (8, 7, 5, 3)]
    store = dist.HashStore()
    with ThreadPoolExecutor(world) as threads:
        first, *others = threads.map(lambda rank: on_rank(rank, world, store, plain, streams), range(world))
    for stream, pixels in zip(streams, first[0], strict=True):
        whole = decoded(vae.decode_latent_frame, vae, stream)
        assert pixels.shape == whole.shape
        assert whole.std() > 0.01
        assert (pixels - whole).abs().max() <= TOLERANCE
    assert all(pixels is None for pixelss, _ in others for pixels in pixelss)
    assert len(first[1]) > 100
    assert all(exchanged == first[1] for _, exchanged in others)


def exchanged_on(
    rank: int, store: dist.Store, plain: AutoencoderKLWan, layout: torch.memory_format
) -> list[tuple[Tensor, Tensor]]:
    shards = WidthShards(copy.deepcopy(plain).decoder, ThreadRank(rank, 2, store))
    own = torch.arange(12.0).view(1, 1, 2, 2, 3) + 100 * rank
    own = torch.cat([own, -own], dim=1).contiguous(memory_format=layout)
    with shards.decoding(6):
        return [
            (torch.compile(exchange, backend="eager", fullgraph=True)(own), exchange(own))
            for exchange in (shards.widen, shards.join)
        ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_exchanges_compile_without_a_break(layout):
    """torch.compile takes an exchange as one operation without a graph break, with the same result; also with the
    channels innermost, as on a GPU."""
    plain = AutoencoderKLWan.from_config({"base_dim": 8, "num_res_blocks": 1})
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        ranks = list(threads.map(lambda rank: exchanged_on(rank, store, plain, layout), range(2)))
    for compiled, plainly in (pair for pairs in ranks for pair in pairs):
        assert torch.equal(compiled, plainly)
    (widened, _), (joined, _) = ranks[0]
    assert widened[0, 0, 0, 0].tolist() == [0, 0, 1, 2, 100]
    assert joined[0, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]


def test_a_copy_of_a_split_decoder_is_whole():
    """The second VAE of a server is copied from one whose decoder is split: it is neither split nor linked to it."""
    vae = AutoencoderKLWan.from_config({"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1,
        "temperal_downsample": [True], "latents_mean": [0.1] * 4, "latents_std": [1.5] * 4})  # fmt: skip
    whole, split = StreamingVAE(copy.deepcopy(vae)), StreamingVAE(vae)
    stream = latents(whole, 3, 6)
    expected = decoded(whole.decode_latent_frame, whole, stream)
    WidthShards(split.decoder, RankGroup(0, 2))
    made = split.copy_in(torch.float32)
    for parameter in split.decoder.parameters():
        parameter.zero_()
    assert torch.equal(decoded(made.decode_latent_frame, made, stream), expected)
    assert made.copy_in(torch.bfloat16).dtype == torch.bfloat16
