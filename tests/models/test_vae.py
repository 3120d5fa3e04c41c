"""The streaming VAE against the reference's frames and against diffusers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanRMS_norm
from safetensors.torch import load_file
from torch import nn

from lingbot_rt.models.i2v_condition import MASK_CHANNELS, preprocess_image
from lingbot_rt.models.vae import StreamingVAE, _compact, channels_last

WAN_22 = {
    "base_dim": 8,
    "z_dim": 12,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "latents_mean": [0.1] * 12,
    "latents_std": [1.5] * 12,
}
RESIDUAL = WAN_22 | {"is_residual": True, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}


@pytest.fixture(scope="module")
def plain(golden) -> AutoencoderKLWan:
    """diffusers' own module with the golden weights."""
    vae = AutoencoderKLWan.from_config(json.loads(golden("vae/config.json").read_text()))
    vae.load_state_dict(load_file(golden("vae/diffusion_pytorch_model.safetensors")))
    return vae.eval()


@pytest.fixture(scope="module")
def vae(plain) -> StreamingVAE:
    return StreamingVAE(copy.deepcopy(plain))


def decode(vae, latents, features) -> torch.Tensor:
    return torch.cat([vae.decode_latent_frame(latent, features) for latent in latents.split(1, dim=2)], dim=2)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    return (pixels[0].permute(1, 2, 3, 0) * 255).to(torch.uint8).numpy()


def test_decode_equals_the_reference(vae, arrays):
    """Nine latent frames, one at a time, give the reference's 33 pixel frames."""
    golden = arrays("vae/decode")
    pixels = decode(vae, golden["latents"], vae.new_features())
    assert (pixels[:, :, :9] - golden["image01_chunk0"]).abs().max() <= 1e-5
    assert (pixels[:, :, -1] - golden["image01_chunk2_last_frame"]).abs().max() <= 1e-5
    assert np.abs(to_uint8(pixels).astype(int) - golden["frames_uint8"].numpy()).max() <= 1


def test_new_features_start_a_session(vae, arrays):
    """With a new feature cache the next latent frame is a session's first: one pixel frame, then four."""
    golden = arrays("vae/decode")
    decode(vae, golden["latents"][:, :, :3], vae.new_features())
    features = vae.new_features()
    assert features.nbytes == 0
    pixels = decode(vae, golden["latents"][:, :, 3:6], features)
    assert np.abs(to_uint8(pixels).astype(int) - golden["reset_decode_of_chunk1_uint8"].numpy()).max() <= 1


def test_sessions_interleave(vae, arrays):
    """Two sessions decoding in turn each get what they get alone, and their memory stays flat."""
    streams = arrays("vae/decode")["latents"].split(4, dim=2)[:2]
    alone = [decode(vae, stream, vae.new_features()) for stream in streams]
    features, pixels, sizes = [vae.new_features() for _ in streams], [[], []], set()
    for i in range(4):
        for which, stream in enumerate(streams):
            pixels[which].append(vae.decode_latent_frame(stream[:, :, i : i + 1], features[which]))
        if i >= 2:
            sizes.add(features[0].nbytes)
    for got, expected in zip(pixels, alone, strict=True):
        assert torch.equal(torch.cat(got, dim=2), expected)
    assert len(sizes) == 1


@pytest.mark.parametrize("config", [WAN_22, RESIDUAL], ids=["patched", "residual"])
def test_wan_22_layouts(config):
    """Layouts that fold 2x2 pixels, with other z, decode and encode as diffusers does on the whole video."""
    torch.manual_seed(0)
    plain = AutoencoderKLWan(**config).eval()
    vae = StreamingVAE(copy.deepcopy(plain))
    stride = 16 if config is RESIDUAL else 8
    latents = torch.randn(1, 12, 3, 4, 6)
    expected = plain.decode(latents * 1.5 + 0.1).sample
    got = decode(vae, latents, vae.new_features())
    assert got.shape == (1, 3, 9, 4 * stride, 6 * stride)
    assert (got - (expected / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-5
    first, later = vae.encode_condition(torch.rand(1, 3, 4 * stride, 6 * stride), 2)
    assert first.shape == later.shape == (1, MASK_CHANNELS + 12, 2, 4, 6)


def test_cpu_layers_equal_diffusers(plain, vae):
    """The convolutions through oneDNN and the norms as plain sums agree with diffusers' own to 1e-5."""
    kinds = {type(module) for module in vae._vae.modules()}
    assert kinds.isdisjoint({WanCausalConv3d, WanRMS_norm, WanResample})
    assert vae._vae.state_dict().keys() == plain.state_dict().keys()
    latents = torch.randn(1, 16, 3, 6, 4)
    mean = torch.tensor(plain.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(plain.config.latents_std).view(1, -1, 1, 1, 1)
    expected = (plain.decode(latents * std + mean).sample / 2 + 0.5).clamp(0, 1)
    assert (decode(vae, latents, vae.new_features()) - expected).abs().max() <= 1e-5


def test_condition_equals_the_reference(vae, arrays):
    """Mask and normalised latents of the first frame, for chunk 0 and for all later chunks."""
    golden = arrays("image_condition/image_condition")
    image = preprocess_image(golden["resized_rgb"].numpy())
    assert (image - golden["preprocessed"]).abs().max() <= 2e-5
    first, later = vae.encode_condition(image, 3)
    assert (first - golden["chunk0_condition"]).abs().max() <= 2e-5
    assert (later - golden["chunk1_condition"]).abs().max() <= 2e-5
    assert (torch.cat([first, later], dim=2) - golden["condition_21_frames"]).abs().max() <= 2e-5


@pytest.mark.parametrize("latent_frames", [1, 2, 5])
def test_condition_of_other_chunk_lengths(vae, latent_frames):
    """Any F keeps the rules: only latent frame 0 of chunk 0 is marked, and the blank tail is what the image leaves."""
    first, later = vae.encode_condition(torch.rand(1, 3, 32, 32) * 2 - 1, latent_frames)
    assert first.shape == later.shape == (1, 20, latent_frames, 4, 4)
    assert first[:, :MASK_CHANNELS, 0].eq(1).all()
    assert not first[:, :MASK_CHANNELS, 1:].any()
    assert not later[:, :MASK_CHANNELS].any()


def test_encoding_leaves_nothing_on_the_module(vae):
    """diffusers' own encoder features are dropped, so that a picture does not outlive its session."""
    vae.encode_condition(torch.rand(1, 3, 32, 32), 1)
    assert all(slot is None for slot in vae._vae._enc_feat_map)


def test_steady_decode_as_a_compiled_function(plain, vae, arrays):
    """Traced and compiled once, from the third latent frame on, the decode gives the same pixels and features."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = StreamingVAE(copy.deepcopy(plain))
    compiled.compile("aot_eager")
    latents = arrays("vae/decode")["latents"]
    features, expected = compiled.new_features(), vae.new_features()
    assert (decode(compiled, latents, features) - decode(vae, latents, expected)).abs().max() <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    kept = sum(slot.untyped_storage().nbytes() for slot in features.slots if isinstance(slot, torch.Tensor))
    assert features.nbytes == expected.nbytes == kept


def test_channels_last_weights(plain, vae, arrays):
    """The layout that accelerators get changes no pixel."""
    other = copy.deepcopy(plain)
    channels_last(other)
    assert other.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    latents = arrays("vae/decode")["latents"][:, :, :4]
    other = StreamingVAE(other)
    difference = decode(other, latents, other.new_features()) - decode(vae, latents, vae.new_features())
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_cached_frames_keep_their_layout(layout):
    """A cached slice joins the next frames in their layout, and does not keep the sliced tensor alive."""
    frames = torch.randn(1, 8, 4, 6, 5).contiguous(memory_format=layout)
    kept = _compact(frames[:, :, -2:])
    assert torch.equal(kept, frames[:, :, -2:])
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert torch.cat([kept, frames], dim=2).is_contiguous(memory_format=layout)


def test_bfloat16_decode(plain, vae, arrays):
    """In bfloat16 the frames stay at 45 dB or better of the float32 ones."""
    half = StreamingVAE(nn.Module.to(copy.deepcopy(plain), torch.bfloat16))
    latents = arrays("vae/decode")["latents"]
    got, expected = decode(half, latents, half.new_features()), decode(vae, latents, vae.new_features())
    assert got.dtype == torch.float32
    psnr = -10 * (got - expected).square().mean().log10().item()
    assert 45 <= psnr < 80
