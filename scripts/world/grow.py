"""Adds layers and place channels to a trained model without changing the pictures that it makes.

    python -m scripts.world.grow

New blocks stand between the old ones, are copies of the block before them, and begin with output projections and camera
modulation of zero, so that they add nothing until they are trained. New channels begin with weights of zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from lingbot_rt.models.checkpoint import load_dit, open_checkpoint
from lingbot_rt.models.dit import CausalDiT, split_qkv
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.shapes import PATCH_SIZE
from scripts.world.config import CONFIGS, WorldConfig
from scripts.world.training_loop import save_part

_SILENT = ("self_attn.o", "cross_attn.o", "ffn.2", "cam_scale_layer", "cam_shift_layer")


def grown_dit(dit: CausalDiT, config: WorldConfig) -> CausalDiT:
    """A DiT of ``config``, which is like that of ``dit`` but for more layers or channels."""
    new = CausalDiT(config.dit)
    old_layers, layers = dit.config.num_layers, config.dit.num_layers
    state = {name: value for name, value in dit.state_dict().items() if not name.startswith("blocks.")}
    taken = -1
    for layer in range(layers):
        of = (layer * old_layers) // layers
        part = {name: value.clone() for name, value in dit.blocks[of].state_dict().items()}  # type: ignore[attr-defined]
        if of == taken:
            for name in part:
                if name.startswith(_SILENT):
                    part[name].zero_()
        taken = of
        state |= {f"blocks.{layer}.{name}": value for name, value in part.items()}
    old, z = dit.config.out_channels, config.z_dim
    noisy, condition = state["patch_embedding.weight"].split([old, MASK_CHANNELS + old], dim=1)
    widened = [_with_zeros(part, 1, z - old) for part in (noisy, condition)]
    state["patch_embedding.weight"] = torch.cat(widened, dim=1)
    for name in ("head.head.weight", "head.head.bias"):
        rows = state[name].unflatten(0, (PATCH_SIZE**2, old))
        state[name] = _with_zeros(rows, 1, z - old).flatten(0, 1)
    new.load_state_dict(state)
    return new


def grown_vae(vae: AutoencoderKLWan, config: WorldConfig) -> dict[str, Tensor]:
    """The weights of ``vae`` with the channels of ``config`` added, which it neither writes nor reads."""
    more = config.z_dim - vae.config.z_dim
    state = {name: value.detach() for name, value in vae.state_dict().items()}

    def halves(part: Tensor) -> Tensor:  # means and log variances
        return _with_zeros(part.unflatten(0, (2, -1)), 1, more).flatten(0, 1)

    for name in ("encoder.conv_out", "quant_conv"):
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = halves(state[f"{name}.{kind}"])
    weight = state["quant_conv.weight"].unflatten(1, (2, -1))
    state["quant_conv.weight"] = _with_zeros(weight, 2, more).flatten(1, 2)
    reads = _with_zeros(state["post_quant_conv.weight"], 1, more)
    state["post_quant_conv.weight"] = _with_zeros(reads, 0, more)
    state["post_quant_conv.bias"] = _with_zeros(state["post_quant_conv.bias"], 0, more)
    state["decoder.conv_in.weight"] = _with_zeros(state["decoder.conv_in.weight"], 1, more)
    return state


def _with_zeros(part: Tensor, dim: int, count: int) -> Tensor:
    shape = list(part.shape)
    shape[dim] = count
    return torch.cat([part, part.new_zeros(shape)], dim=dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", dest="run", type=Path, default=Path("runs/world"))
    parser.add_argument("--config", choices=CONFIGS, default="full", help="what the model grows to (default: full)")
    args = parser.parse_args()
    config, cpu = CONFIGS[args.config], torch.device("cpu")
    model = args.run / "model"
    transformer, vae_folder = model / "transformer", model / "vae"
    dit = grown_dit(load_dit(open_checkpoint(str(model)), torch.float32, cpu), config)
    save_part(transformer, config.transformer, split_qkv(dit.state_dict()))
    vae = AutoencoderKLWan.from_pretrained(vae_folder)
    names, more = ("latents_mean", "latents_std"), config.z_dim - vae.config.z_dim
    scale = {name: [*getattr(vae.config, name), *config.vae[name][:more]] for name in names}
    save_part(vae_folder, config.vae | scale, grown_vae(vae, config))


if __name__ == "__main__":
    main()
