"""The built-in world's procedural weights: untrained, but the picture answers to keys and prompts.

Most weights are small random noise. A few are set by hand. Those of the VAE encode and decode the coarse colours of a
picture. Those of the DiT predict, for every latent frame, the session's first picture: attention finds it, the camera's
turn and step displace it, and the prompt tints it.
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
"""A module whose layers are reached by name. A type checker sees everything below one as a Tensor or a Module."""

_COPIES = 4
"""Latent channels per colour: the mean of several is less noisy than one."""

_LATENT_GAIN = 2.0  # colours are around 0.5, latents should be around 1
_NORM_FLOOR = 8.0  # a constant channel this large makes a norm over channels nearly a constant
_CELLS = PATCH_SIZE**2


# VAE channels: 0..2 are red, green and blue, 3..5 their negatives, 6 a constant. silu(x) - silu(-x) = x, and the
# constant dominates the norms, so the last norm and silu of the encoder and of the decoder lose nothing.


def init_vae(vae: Network) -> None:
    """Sets the weights of an AutoencoderKLWan. A decoded picture is the encoded one, smoothed over a latent cell."""
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "proj.weight")):
            # The last layer of each residual branch: nothing in the encoder, a little noise in the decoder.
            parameter.mul_(0.02 if name.startswith("decoder") else 0)
        elif name.endswith((".bias", "_conv.weight", "conv_in.weight", "conv_out.weight", "conv_shortcut.weight")):
            parameter.zero_()
    for module in (vae.quant_conv, vae.post_quant_conv):
        _set_identity(module.weight)
    for module in vae.modules():
        if isinstance(module, WanResample):
            _init_resample(module)
    for block in vae.encoder.down_blocks:
        if isinstance(getattr(block, "conv_shortcut", None), nn.Conv3d):
            _set_identity(block.conv_shortcut.weight)

    for colour in range(3):
        for sign, channel in ((1, colour), (-1, colour + 3)):
            vae.encoder.conv_in.weight[channel, 4 * colour : 4 * colour + 4, -1, 1, 1] = sign / 4
            latents = slice(_COPIES * colour, _COPIES * (colour + 1))
            width = vae.encoder.conv_out.weight.shape[1]
            gain = sign * _LATENT_GAIN * _NORM_FLOOR / width**0.5
            vae.encoder.conv_out.weight[latents, channel, -1, 1, 1] = gain
            vae.decoder.conv_in.weight[channel, latents, -1, 1, 1] = sign / (_LATENT_GAIN * _COPIES)
            width = vae.decoder.conv_out.weight.shape[1]
            for column in range(2):
                for row in range(2):
                    kernel = torch.outer(_lerp_taps(row), _lerp_taps(column)) * sign * _NORM_FLOOR / width**0.5
                    vae.decoder.conv_out.weight[4 * colour + 2 * column + row, channel, -1] = kernel
    for side in (vae.encoder, vae.decoder):
        side.conv_in.bias[6] = _NORM_FLOOR


def _init_resample(module: Network) -> None:
    convolution = module.resample[1]
    kernel = torch.zeros(3, 3)
    if module.mode.startswith("upsample"):
        smooth = torch.tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(smooth, smooth)
        # The first frame of each pair is half-way between the frame before and the second one.
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


def _lerp_taps(side: int) -> Tensor:
    """Linear interpolation taps of the first (0) or second (1) of two samples inside a cell."""
    taps = torch.tensor([0.25, 0.75, 0.0])
    return taps if side == 0 else taps.flip(0)


def _set_identity(weight: Tensor) -> None:
    weight.zero_()
    for channel in range(min(weight.shape[:2])):
        weight[channel, channel] = 1


# DiT: the residual stream of a token holds
#   noisy        its noisy latents, 4 cells per channel
#   picture      its image-condition latents
#   mark         1 if it belongs to the first latent frame; plus, minus: constants that dominate the layer norms
#   camera       its mean ray direction x, y and step x, z
#   prediction   its predicted clean latents, read from the first frame by attention
# Block 0 writes camera and adds the sway, block 1 writes prediction, the head gives v = (noisy - prediction) / sigma.

_CONSTANT = 128.0
_TURN = 12.0  # tokens that the picture moves per unit of ray direction
_STEP = 2.0  # tokens that it moves per step at full speed
_TEXT_GAIN = 3.0  # factor on the random weights of each layer between text and tint
_SWAY = 1.6  # most tokens that it sways sideways without a key
_CAMERA_RAYS = (3, 4, 0, 2)  # of (origin xyz, direction xyz)


def init_dit(dit: Network) -> None:
    """Sets the weights of a CausalDiT. Its width must be at least 12 times the latent channels, and 8 more."""
    latents, config = dit.config.out_channels * _CELLS, dit.config
    noisy, picture = slice(0, latents), slice(latents, 2 * latents)
    prediction = slice(config.dim - latents, config.dim)
    mark, plus, minus, camera = (2 * latents + offset for offset in (0, 1, 2, 3))
    norm_std = ((2 * _CONSTANT**2 + 2 * latents) / config.dim) ** 0.5

    _init_patch_embedding(dit, noisy, picture, (mark, plus, minus))
    _init_time_embedding(dit)
    _set_zero(dit.patch_embedding_wancamctrl, dit.c2ws_hidden_states_layer2)
    for i, ray in enumerate(_CAMERA_RAYS):
        features = RAY_CHANNELS // 6 * _CELLS
        dit.patch_embedding_wancamctrl.weight[camera + i, ray * features : (ray + 1) * features] = 1 / features

    for layer in (dit.text_embedding[0], dit.text_embedding[2], *(block.cross_attn.v for block in dit.blocks)):
        # Without biases padding rows stay zero, so only the prompt's own rows tint the picture.
        layer.weight.mul_(_TEXT_GAIN)
        layer.bias.zero_()
    for block in dit.blocks:
        _set_zero(block.cam_injector_layer2, block.cam_scale_layer, block.cam_shift_layer)
        block.modulation[:, (2, 5)] = 1
        for entry in (block.self_attn.qkv, block.ffn[0]):
            entry.weight.mul_(norm_std)
            entry.weight[:, [plus, minus]] = 0
        # With zero queries every token reads the same mean of the text, so a prompt tints the whole picture.
        block.cross_attn.q.weight.zero_()
        for output, strength in ((block.self_attn.o, 0.1), (block.cross_attn.o, 0.1), (block.ffn[2], 0.1)):
            output.bias.zero_()
            rows = output.weight[prediction] * strength
            output.weight.zero_()
            # All cells of a channel get the same value: a tint, not a texture.
            output.weight[prediction] = rows.unflatten(0, (-1, _CELLS)).mean(1).repeat_interleave(_CELLS, 0) * _CELLS
    for i in range(len(_CAMERA_RAYS)):
        dit.blocks[0].cam_shift_layer.weight[camera + i, camera + i] = 1
    _init_sway(dit, dit.blocks[0].self_attn, mark, camera, norm_std)
    _init_picture_search(dit, dit.blocks[1].self_attn, (mark, plus, minus, camera), picture, norm_std)
    dit.blocks[1].self_attn.o.weight.zero_()
    dit.blocks[1].self_attn.o.weight[prediction, :latents] = torch.eye(latents)

    _set_zero(dit.head.head)
    for cell in range(_CELLS):
        for channel in range(config.out_channels):
            row, feature = cell * config.out_channels + channel, channel * _CELLS + cell
            dit.head.head.weight[row, noisy.start + feature] = norm_std
            dit.head.head.weight[row, prediction.start + feature] = -norm_std


def _init_patch_embedding(dit: Network, noisy: slice, picture: slice, constants: tuple[int, int, int]) -> None:
    mark, plus, minus = constants
    z_dim = dit.config.out_channels
    weight, bias = dit.patch_embedding.weight, dit.patch_embedding.bias
    weight.zero_()
    bias.zero_()
    for channel in range(z_dim):
        for cell in range(_CELLS):
            cell_index = (0, cell // PATCH_SIZE, cell % PATCH_SIZE)
            weight[(noisy.start + channel * _CELLS + cell, channel, *cell_index)] = 1
            weight[(picture.start + channel * _CELLS + cell, z_dim + MASK_CHANNELS + channel, *cell_index)] = 1
    weight[mark, z_dim, 0, 0, 0] = 1
    bias[plus], bias[minus] = _CONSTANT, -_CONSTANT


def _init_time_embedding(dit: Network) -> None:
    """Fits the last layer of the time embedding by least squares, so that it gives 1 / sigma - 1, the head's scale."""
    _set_zero(dit.time_projection[1])
    for table in (dit.head.modulation, *(block.modulation for block in dit.blocks)):
        table.zero_()
    half = dit.config.freq_dim // 2
    timesteps = torch.linspace(250, 1000, 1000, dtype=torch.float64)
    angles = torch.outer(timesteps, 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half))
    hidden = nn.functional.silu(dit.time_embedding[0](torch.cat([angles.cos(), angles.sin()], dim=1).float())).double()
    # The ridge term keeps the solution small, so that it also holds between the samples.
    ridge = 1e-3 * torch.eye(hidden.shape[1], dtype=torch.float64)
    wanted = 1000 / timesteps - 1
    solution = torch.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ wanted)
    dit.time_embedding[2].weight[:] = solution.float()
    dit.time_embedding[2].bias.zero_()


def _init_sway(dit: Network, attention: Network, mark: int, camera: int, norm_std: float) -> None:
    """Makes the picture move sideways over time, without keys.

    Head 0 attends to the marked frame with a weight that follows cos(f t). That weight moves the camera sideways.
    """
    width = dit.config.dim
    _set_zero(attention.qkv, attention.o)
    time_pair = 2  # the second frequency: a period of 13 latent frames at 24 time dimensions
    attention.qkv.bias[time_pair] = 1
    attention.qkv.weight[width + time_pair, mark] = norm_std
    # Only one dimension is set, so the norm over the full width makes it sqrt(width). The score is then within +-2.4.
    attention.norm_q.weight[time_pair] = 2.4 * dit.config.attention_head_dim**0.5 / width
    attention.qkv.weight[2 * width, mark] = norm_std
    attention.o.weight[camera, 0] = 2 * _SWAY / _TURN


def _init_picture_search(
    dit: Network, attention: Network, dims: tuple[int, int, int, int], picture: slice, norm_std: float
) -> None:
    """Makes head 0 attend to the first frame's token at its own position plus the camera's displacement.

    If q = k = (1, 0) in a pair of frequency f, RoPE makes the score cos(f d) at distance d. Four frequencies per axis
    give a peak one token wide. Rotating q by f s moves the peak by s tokens.
    """
    mark, plus, minus, camera = dims
    width, head_dim = dit.config.dim, dit.config.attention_head_dim
    q_rows, k_rows, v_rows = slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width)
    qkv = attention.qkv
    _set_zero(qkv)
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
    # The lowest frequency of the height axis hardly rotates within a picture, so its pair compares the mark.
    slowest = time_dims + height_dims - 2
    q_bias[slowest] = 1
    qkv.weight[k_rows][slowest, mark] = norm_std
    attention.norm_q.weight[slowest] = 4
    for i in range(picture.stop - picture.start):
        qkv.weight[v_rows][i, picture.start + i] = norm_std
        # plus and minus cancel, except for the mean that the layer norm removed: this adds it back.
        qkv.weight[v_rows][i, plus] = qkv.weight[v_rows][i, minus] = -norm_std / 2


def _set_zero(*layers: Network) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()
