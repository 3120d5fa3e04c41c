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
    # The last rank is late for every exchange. A rank that ran ahead would mix up those of two frames.
    group = ThreadRank(rank, world, store, LATE_S if rank == world - 1 else 0.0)
    vae = StreamingVAE(copy.deepcopy(plain))
    decode = parallelize_decoder(vae, group, "width")
    return [decoded(decode, vae, stream) for stream in streams], group.exchanged


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("generation", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
def test_shards_make_the_whole(world, generation):
    """Even widths, uneven ones, one where the margins reach over all ranks, and one with fewer columns than four ranks:
    rank 0's pixels equal the whole decode's to 1e-5 over five latent frames, and the other ranks have none. Every rank,
    one of them late, takes part in one exchange per latent frame."""
    torch.manual_seed(1)
    plain = AutoencoderKLWan.from_config({"base_dim": 8, "num_res_blocks": 1} | generation)
    vae = StreamingVAE(copy.deepcopy(plain))
    streams = [latents(vae, 2, width) for width in (40, 33, 5, 3)]
    store = dist.HashStore()
    with ThreadPoolExecutor(world) as threads:
        first, *others = threads.map(lambda rank: on_rank(rank, world, store, plain, streams), range(world))
    for stream, pixels in zip(streams, first[0], strict=True):
        whole = decoded(vae.decode_latent_frame, vae, stream)
        assert pixels.shape == whole.shape
        assert whole.std() > 0.01
        assert (pixels - whole).abs().max() <= TOLERANCE
    assert all(pixels is None for pixelss, _ in others for pixels in pixelss)
    assert len(first[1]) == FRAMES * (4 if world == 2 else 3)
    assert all(exchanged == first[1] for _, exchanged in others)


@torch.inference_mode()
def test_a_split_decode_compiles_without_a_break():
    """torch.compile takes the decode of each of two ranks whole, with the same pixels."""
    plain = AutoencoderKLWan.from_config({"base_dim": 8, "num_res_blocks": 1})
    for rank in range(2):
        vae = StreamingVAE(copy.deepcopy(plain))
        shards = WidthShards(vae.decoder, RankGroup(rank, 2))
        stream = latents(vae, 2, 33)
        with shards.decoding(33):
            expected = decoded(vae.decode_latent_frame, vae, stream)
            vae._steady_decode = torch.compile(vae._decode, backend="eager", fullgraph=True, dynamic=False)
            assert torch.equal(decoded(vae.decode_latent_frame, vae, stream), expected)
        assert expected.shape[-1] == 8 * (17 - rank)


@torch.inference_mode()
def test_a_rank_keeps_its_share_of_the_features():
    """``share`` is the part of the features' bytes that the rank with most columns has, to 5 %; of the published VAE at
    832x480 on two GPUs it is little more than half."""
    vae = StreamingVAE(AutoencoderKLWan.from_config({"base_dim": 8, "num_res_blocks": 1}))
    whole, own = vae.new_features(), vae.new_features()
    for latent in latents(vae, 2, 96).split(1, dim=2):
        vae.decode_latent_frame(latent, whole)
    shards = WidthShards(vae.decoder, RankGroup(1, 3))
    with shards.decoding(96):
        for latent in latents(vae, 2, 96).split(1, dim=2):
            vae.decode_latent_frame(latent, own)
    assert shards.share(96) == pytest.approx(own.nbytes / whole.nbytes, rel=0.05)
    with torch.device("meta"):
        published = WidthShards(AutoencoderKLWan().decoder, RankGroup(0, 2))
    assert 0.5 < published.share(104) < 0.54
    # Pixels need none; each convolution one more, at half of it below an upsampling.
    assert published._levels == [(1, 13), (2, 12), (4, 10), (8, 7), (8, 1), (8, 0)]


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
