"""Weights of the built-in world's first form: drawn, not trained, but drawn so that something can be seen.

Most of the network is small random noise. Through it run a few hand-laid paths: the VAE carries the coarse colours of
a picture, and the DiT predicts, for every latent frame, the session's first picture, found again by attention and
displaced by the camera's turn and step, tinted by the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn

from lingbot_rt.models.dit import RAY_CHANNELS
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.rope import THETA, axis_dims
from lingbot_rt.shapes import PATCH_SIZE

Network = Any
"""A module whose layers are reached by name; to a type checker everything below one is a Tensor or a Module."""

COPIES = 4
"""Latent channels that carry each colour: their mean is steadier than one of them."""

_LATENT_GAIN = 2.0  # a picture's colours are around 0.5; latents should be around 1
_NORM_FLOOR = 8.0  # a constant channel this large makes a norm over channels nearly a constant
_CELLS = PATCH_SIZE**2


# VAE: channels 0..2 are red, green, blue, 3..5 their negatives, 6 a constant. silu(x) - silu(-x) = x, and the constant
# channel rules the norms, so the last norm and silu of either side are passed without loss.


def draw_vae(vae: Network) -> None:
    """Fills an AutoencoderKLWan's encoder and decoder; the picture comes back smoothed over a latent cell."""
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "proj.weight")):
            # The branches' ends: silent in the encoder, a little life in the decoder.
            parameter.mul_(0.02 if name.startswith("decoder") else 0)
        elif name.endswith((".bias", "_conv.weight", "conv_in.weight", "conv_out.weight", "conv_shortcut.weight")):
            parameter.zero_()
    for module in (vae.quant_conv, vae.post_quant_conv):
        _identity(module.weight)
    for module in vae.modules():
        if isinstance(module, WanResample):
            _draw_resample(module)
    for block in vae.encoder.down_blocks:
        if isinstance(getattr(block, "conv_shortcut", None), nn.Conv3d):
            _identity(block.conv_shortcut.weight)

    for colour in range(3):
        for sign, channel in ((1, colour), (-1, colour + 3)):
            vae.encoder.conv_in.weight[channel, 4 * colour : 4 * colour + 4, -1, 1, 1] = sign / 4
            latents = slice(COPIES * colour, COPIES * (colour + 1))
            width = vae.encoder.conv_out.weight.shape[1]
            gain = sign * _LATENT_GAIN * _NORM_FLOOR / width**0.5
            vae.encoder.conv_out.weight[latents, channel, -1, 1, 1] = gain
            vae.decoder.conv_in.weight[channel, latents, -1, 1, 1] = sign / (_LATENT_GAIN * COPIES)
            width = vae.decoder.conv_out.weight.shape[1]
            for column in range(2):
                for row in range(2):
                    kernel = torch.outer(_towards(row), _towards(column)) * sign * _NORM_FLOOR / width**0.5
                    vae.decoder.conv_out.weight[4 * colour + 2 * column + row, channel, -1] = kernel
    for side in (vae.encoder, vae.decoder):
        side.conv_in.bias[6] = _NORM_FLOOR


def _draw_resample(module: Network) -> None:
    convolution = module.resample[1]
    kernel = torch.zeros(3, 3)
    if module.mode.startswith("upsample"):
        smooth = torch.tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(smooth, smooth)
        # Of each pair of frames the first lies half-way from the frame before.
        half = module.dim
        for channel in range(module.dim):
            module.time_conv.weight[channel, channel, 1:, 0, 0] = 0.5
            module.time_conv.weight[half + channel, channel, 2, 0, 0] = 1
    else:
        kernel[:2, :2] = 0.25
        for channel in range(module.dim):
            module.time_conv.weight[channel, channel, 1:, 0, 0] = 0.5
    convolution.weight.zero_()
    for channel in range(convolution.weight.shape[0]):
        convolution.weight[channel, channel] = kernel


def _towards(side: int) -> Tensor:
    """Linear interpolation taps for the first (0) or second (1) of two samples inside a cell."""
    taps = torch.tensor([0.25, 0.75, 0.0])
    return taps if side == 0 else taps.flip(0)


def _identity(weight: Tensor) -> None:
    weight.zero_()
    for channel in range(min(weight.shape[:2])):
        weight[channel, channel] = 1


# DiT: the residual stream of a token is laid out as
#   NOISY   its noisy latents, 4 cells a channel
#   PICTURE its image-condition latents
#   MARK    whether it belongs to the first frame's picture; PLUS, MINUS constants that rule the layer norms
#   CAMERA  mean ray direction x, y and step x, z of the token
#   FOUND   what attention brought: the prediction of the clean latents
# Block 0 writes CAMERA and its sway, block 1 finds the picture, the head gives v = (NOISY - FOUND) / sigma.

_CONSTANT = 128.0
_TURN = 12.0  # tokens the picture moves for a ray displaced by one
_STEP = 2.0  # tokens it moves for a step at full speed
_WORDS = 3.0  # how much louder each layer on the way of the text is than a random one
_SWAY = 1.6  # tokens it sways to and fro by itself, at most
_CAMERA_RAYS = (3, 4, 0, 2)  # of (origin xyz, direction xyz)


def draw_dit(dit: Network) -> None:
    """Fills a CausalDiT; needs a width of at least 3 tokens' latents and 8 more."""
    latents, config = dit.config.out_channels * _CELLS, dit.config
    noisy, picture = slice(0, latents), slice(latents, 2 * latents)
    found = slice(config.dim - latents, config.dim)
    mark, plus, minus, camera = (2 * latents + offset for offset in (0, 1, 2, 3))
    norm_std = ((2 * _CONSTANT**2 + 2 * latents) / config.dim) ** 0.5

    _draw_inputs(dit, noisy, picture, (mark, plus, minus))
    _draw_time(dit)
    _silence(dit.patch_embedding_wancamctrl, dit.c2ws_hidden_states_layer2)
    for i, ray in enumerate(_CAMERA_RAYS):
        features = RAY_CHANNELS // 6 * _CELLS
        dit.patch_embedding_wancamctrl.weight[camera + i, ray * features : (ray + 1) * features] = 1 / features

    for layer in (dit.text_embedding[0], dit.text_embedding[2], *(block.cross_attn.v for block in dit.blocks)):
        # Padding rows stay zero and the words' rows grow: a prompt's tint is its own.
        layer.weight.mul_(_WORDS)
        layer.bias.zero_()
    for block in dit.blocks:
        _silence(block.cam_injector_layer2, block.cam_scale_layer, block.cam_shift_layer)
        block.modulation[:, (2, 5)] = 1
        for entry in (block.self_attn.qkv, block.ffn[0]):
            entry.weight.mul_(norm_std)
            entry.weight[:, [plus, minus]] = 0
        # Every token asks the text the same: a prompt tints the picture as a whole.
        block.cross_attn.q.weight.zero_()
        for output, strength in ((block.self_attn.o, 0.1), (block.cross_attn.o, 0.1), (block.ffn[2], 0.1)):
            output.bias.zero_()
            kept = output.weight[found] * strength
            output.weight.zero_()
            # The cells of a channel move together: a tint, not a texture.
            output.weight[found] = kept.unflatten(0, (-1, _CELLS)).mean(1).repeat_interleave(_CELLS, 0) * _CELLS
    for i in range(len(_CAMERA_RAYS)):
        dit.blocks[0].cam_shift_layer.weight[camera + i, camera + i] = 1
    _draw_sway(dit, dit.blocks[0].self_attn, mark, camera, norm_std)
    _draw_search(dit, dit.blocks[1].self_attn, (mark, plus, minus, camera), picture, norm_std)
    dit.blocks[1].self_attn.o.weight.zero_()
    dit.blocks[1].self_attn.o.weight[found, :latents] = torch.eye(latents)

    _silence(dit.head.head)
    for cell in range(_CELLS):
        for channel in range(config.out_channels):
            row, feature = cell * config.out_channels + channel, channel * _CELLS + cell
            dit.head.head.weight[row, noisy.start + feature] = norm_std
            dit.head.head.weight[row, found.start + feature] = -norm_std


def _draw_inputs(dit: Network, noisy: slice, picture: slice, constants: tuple[int, int, int]) -> None:
    mark, plus, minus = constants
    z_dim = dit.config.out_channels
    weight, bias = dit.patch_embedding.weight, dit.patch_embedding.bias
    weight.zero_()
    bias.zero_()
    for channel in range(z_dim):
        for cell in range(_CELLS):
            place = (0, cell // PATCH_SIZE, cell % PATCH_SIZE)
            weight[(noisy.start + channel * _CELLS + cell, channel, *place)] = 1
            weight[(picture.start + channel * _CELLS + cell, z_dim + MASK_CHANNELS + channel, *place)] = 1
    weight[mark, z_dim, 0, 0, 0] = 1
    bias[plus], bias[minus] = _CONSTANT, -_CONSTANT


def _draw_time(dit: Network) -> None:
    """The time embedding becomes 1 / sigma - 1, the head's scale, by least squares over its last layer."""
    _silence(dit.time_projection[1])
    for table in (dit.head.modulation, *(block.modulation for block in dit.blocks)):
        table.zero_()
    half = dit.config.freq_dim // 2
    timesteps = torch.linspace(250, 1000, 1000, dtype=torch.float64)
    angles = torch.outer(timesteps, 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half))
    hidden = nn.functional.silu(dit.time_embedding[0](torch.cat([angles.cos(), angles.sin()], dim=1).float())).double()
    # A little ridge keeps the solution small, so that it holds between the samples too.
    ridge = 1e-3 * torch.eye(hidden.shape[1], dtype=torch.float64)
    wanted = 1000 / timesteps - 1
    solution = torch.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ wanted)
    dit.time_embedding[2].weight[:] = solution.float()
    dit.time_embedding[2].bias.zero_()


def _draw_sway(dit: Network, attention: Network, mark: int, camera: int, norm_std: float) -> None:
    """Head 0 weighs the marked frame against all others by cos(f t), and moves the camera sideways by that weight."""
    width = dit.config.dim
    _silence(attention.qkv, attention.o)
    time_pair = 2  # the second frequency: a period of 13 latent frames at 24 time dimensions
    attention.qkv.bias[time_pair] = 1
    attention.qkv.weight[width + time_pair, mark] = norm_std
    # One dimension of all is set, so the norms over the full width make it sqrt(width): a score of +-2.4 in all.
    attention.norm_q.weight[time_pair] = 2.4 * dit.config.attention_head_dim**0.5 / width
    attention.qkv.weight[2 * width, mark] = norm_std
    attention.o.weight[camera, 0] = 2 * _SWAY / _TURN


def _draw_search(
    dit: Network, attention: Network, dims: tuple[int, int, int, int], picture: slice, norm_std: float
) -> None:
    """Head 0 finds the marked token at its own place, displaced by the camera, and brings its picture.

    With q = k = (1, 0) in a pair of frequency f, RoPE makes the score cos(f d) at distance d: four frequencies of an
    axis give a peak one token wide. Turning q by f s moves the peak by s tokens.
    """
    mark, plus, minus, camera = dims
    width, head_dim = dit.config.dim, dit.config.attention_head_dim
    q_rows, k_rows, v_rows = slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width)
    qkv = attention.qkv
    _silence(qkv)
    q_bias, k_bias = qkv.bias[q_rows], qkv.bias[k_rows]
    time_dims, height_dims, width_dims = axis_dims(head_dim)
    for first, dims_of_axis, turn, steps in (
        (time_dims, height_dims, camera + 1, {camera + 3: -_STEP}),
        (time_dims + height_dims, width_dims, camera, {camera + 2: _STEP}),
    ):
        for pair in range(4):
            frequency = THETA ** (-2 * pair / dims_of_axis)
            even = first + 2 * pair
            q_bias[even] = k_bias[even] = 1
            attention.norm_q.weight[even : even + 2] = 1.5
            for source, tokens in {turn: _TURN, **steps}.items():
                qkv.weight[q_rows][even + 1, source] = frequency * tokens * norm_std
    # The slowest pair of the height axis hardly turns over a picture: it compares the mark.
    slowest = time_dims + height_dims - 2
    q_bias[slowest] = 1
    qkv.weight[k_rows][slowest, mark] = norm_std
    attention.norm_q.weight[slowest] = 4
    for i in range(picture.stop - picture.start):
        qkv.weight[v_rows][i, picture.start + i] = norm_std
        # plus and minus cancel but for the mean that the layer norm took away.
        qkv.weight[v_rows][i, plus] = qkv.weight[v_rows][i, minus] = -norm_std / 2


def _silence(*layers: Network) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()
