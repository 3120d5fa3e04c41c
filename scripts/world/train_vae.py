"""Stage 2: trains the VAE on clips of random trajectories, which are rendered while it trains.

python -m scripts.world.train_vae --minutes 8
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from lingbot_rt.models.vae import channels_last
from scripts.world.captured import Captured
from scripts.world.config import WorldConfig
from scripts.world.muon import muon_and_adamw
from scripts.world.place_channels import PLACE_CHANNELS, leave_places_to_the_dit
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS
from scripts.world.training_loop import (
    EMA,
    Options,
    Stateful,
    TrainingLoop,
    learning_rate,
    save_part,
    set_learning_rate,
)
from scripts.world.trajectories import make_trajectory, random_actions, start_view
from scripts.world.whole_clip import decode, encode, use_whole_clips

LATENT_FRAMES = 4  # per clip: 13 pictures
PEAK_RATE = 1e-3
KL_WEIGHT = 1e-6
LATENT_NOISE = 0.03
"""Most noise added to latents in training, so that the decoder tolerates small errors of the DiT."""

REFRESH_EVERY = 4  # steps

GREY_SHARE, SWITCH_SHARE = 0.05, 0.1
"""Shares of clips that turn grey after their first picture, like an image condition, and that change their look."""


class ClipPool:
    """Rendered clips, uint8 [N, T, H, W, 3] on the device. Rendering is slower than training, so clips are reused."""

    def __init__(self, renderer: Renderer, clips: int, seed: int) -> None:
        self._renderer = renderer
        self._rng = np.random.default_rng(seed)
        self._next = 0
        first = self._render(min(16, clips))
        self.clips = first.new_empty(clips, *first.shape[1:])
        while self._next < clips:
            self.refresh(min(16, clips - self._next))
        self._next = 0

    def refresh(self, count: int) -> None:
        """Replaces the oldest ``count`` clips with new ones."""
        indices = (torch.arange(count) + self._next) % len(self.clips)
        self.clips[indices.to(self.clips.device)] = self._render(count)
        self._next += count

    def batch(self, count: int) -> Tensor:
        """Random clips, [count, 3, T, H, W] in [-1, 1]."""
        return video(self.clips[torch.randint(len(self.clips), (count,), device=self.clips.device)])

    def _render(self, count: int) -> Tensor:
        poses, looks, grey = [], [], []
        frames = 4 * (LATENT_FRAMES - 1) + 1
        for _ in range(count):
            # Sessions reach any pitch; most views are nearly level.
            start = start_view(self._rng, float(np.clip(self._rng.normal(0, 15), -75, 75)))
            view = make_trajectory(start, random_actions(self._rng, LATENT_FRAMES)).view.pixel_frames()
            poses.append(view.poses())
            look = np.full(frames, self._rng.integers(len(LOOKS)))
            if self._rng.random() < SWITCH_SHARE:
                look[4 * self._rng.integers(1, LATENT_FRAMES) - 3 :] = self._rng.integers(len(LOOKS))
            looks.append(look)
            grey.append(self._rng.random() < GREY_SHARE)
        pictures = self._renderer.render(np.concatenate(poses), torch.from_numpy(np.concatenate(looks)))
        clips = pictures.unflatten(0, (count, frames))
        clips[torch.tensor(grey, device=clips.device), 1:] = 128
        return clips


def video(clips_BTHW3: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in [-1, 1]."""
    return clips_BTHW3.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def new_vae(config: WorldConfig) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_config(config.vae)
    leave_places_to_the_dit(vae)
    return vae


def load_vae(folder: Path, config: WorldConfig) -> AutoencoderKLWan:
    """Raises ValueError for a VAE without the place channels, whose last channels show pictures."""
    vae = AutoencoderKLWan.from_pretrained(folder)
    if vae.config.z_dim != config.z_dim:
        raise ValueError(f"{folder} has {vae.config.z_dim} channels, not {config.z_dim}: run scripts.world.grow first")
    return vae


def picture_loss(got: Tensor, true: Tensor) -> Tensor:
    """L1, sixteen times the squared error, and L1 between picture gradients at three scales, which sharpens edges."""
    loss = F.l1_loss(got, true) + 16 * F.mse_loss(got, true)
    a, b = (x.transpose(1, 2).flatten(0, 1) for x in (got, true))
    for _ in range(3):
        for dim in (-1, -2):
            loss = loss + 0.5 / 3 * F.l1_loss(a.diff(dim=dim), b.diff(dim=dim))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


def psnr(got: Tensor, true: Tensor) -> Tensor:
    """dB between pictures in [-1, 1]."""
    return -10 * torch.log10(F.mse_loss(got.clamp(-1, 1), true) / 4)


def reconstruction(vae: Any, latents: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the PSNR of decoded latents."""
    got = decode(vae, latents).float()
    return picture_loss(got, true), psnr(got.detach(), true)


def make_optimisers(vae: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between features, AdamW for those at the ends and all other parameters.

    With Muon training needs fewer steps for the same PSNR: docs/training.md has the figures.
    """

    def for_muon(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 4 and not any(end in name for end in ("conv_in", "conv_out", "quant_conv"))

    return muon_and_adamw(vae, for_muon, betas=(0.9, 0.98), weight_decay=1e-3, scale=2.0)


def train(options: Options, batch: int, clips: int, refresh: int = 4, decoder_only: bool = False) -> float:
    """Trains the VAE and returns its PSNR on held-out clips.

    ``decoder_only``: the encoder stays as it is, so latents that are stored and a DiT that is trained stay valid.
    """
    config, device = options.config, options.device
    folder = options.model / "vae"
    from_checkpoint = (folder / "config.json").exists()
    vae = load_vae(folder, config) if from_checkpoint else new_vae(config)
    vae = use_whole_clips(vae.to(device).train())
    if decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    on_cuda = device.type == "cuda"
    encoded: Callable[..., tuple[Tensor, Tensor]] = encode
    reconstructed: Callable[..., tuple[Tensor, Tensor]] = reconstruction
    if on_cuda:
        channels_last(vae)
        torch.backends.cudnn.benchmark = True
        encoded, reconstructed = (torch.compile(one, dynamic=False) for one in (encode, reconstruction))
    ema = EMA(vae)
    optimisers = make_optimisers(vae)
    parts: dict[str, Stateful] = {"vae": vae, "average": ema}
    parts |= {f"optimiser{i}": each for i, each in enumerate(optimisers)}
    loop = TrainingLoop("decoder" if decoder_only else "vae", options, parts)
    renderer = Renderer(config.size, device, config.supersample)
    ranks = options.ranks
    ranks.share_weights(vae)
    pool = ClipPool(renderer, clips, seed=options.seed + 1 + loop.step + 10**5 * ranks.rank)
    held_out = ClipPool(renderer, min(32, clips), seed=10**6)
    facts = {"from_checkpoint": from_checkpoint, "pool_seconds": round(loop.seconds, 1)}
    loop.log(**facts)

    def gradients() -> dict[str, Tensor]:
        vae.zero_grad(set_to_none=True)
        true = pool.batch(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
            mean, log_variance = (part.float() for part in encoded(vae, true))
            noise = LATENT_NOISE * torch.rand(batch, 1, 1, 1, 1, device=device) + torch.exp(0.5 * log_variance)
            latents = mean + torch.randn_like(mean) * noise
            latents[:, -PLACE_CHANNELS:] = 0
            loss, score = reconstructed(vae, latents, true)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        (loss + KL_WEIGHT * kl).backward()
        return {"loss": loss, "kl": kl, "psnr": score}

    step_gradients = Captured(gradients, device)
    for step in loop:
        set_learning_rate(optimisers, learning_rate(loop, PEAK_RATE))
        if refresh and step % REFRESH_EVERY == 0:
            pool.refresh(min(refresh, clips))
        figures = step_gradients()
        ranks.average_gradients(vae.parameters())
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        ema.update()
        loop.record(**figures, grad=norm)
    ema.apply()
    return _finish(options, loop, vae.eval(), held_out)


@torch.no_grad()
def _finish(options: Options, loop: TrainingLoop, vae: Any, held_out: ClipPool) -> float:
    """Measures the PSNR on held-out clips and writes vae/. Its configuration has the latents' means and deviations."""
    latents, scores = [], []
    for clips in held_out.clips.split(8):
        true = video(clips)
        mean, _ = encode(vae, true)
        latents.append(mean)
        scores += [psnr(a, b) for a, b in zip(decode(vae, mean), true, strict=True)]
    rows = torch.cat(latents).transpose(0, 1).flatten(1)[:-PLACE_CHANNELS]
    places = options.config.vae
    mean, deviation = (
        measured.tolist() + places[name][-PLACE_CHANNELS:]
        for name, measured in (("latents_mean", rows.mean(1)), ("latents_std", rows.std(1).clamp_min(1e-3)))
    )
    if not next(vae.encoder.parameters()).requires_grad:  # the DiT was trained with these
        mean, deviation = vae.config.latents_mean, vae.config.latents_std
    config = options.config.vae | {"latents_mean": mean, "latents_std": deviation}
    if options.ranks.is_first:
        save_part(options.model / "vae", config, vae.state_dict())
    score = torch.stack(scores).mean().item()
    loop.log(
        held_out_psnr=round(score, 2),
        std_range=[round(rows.std(1).min().item(), 3), round(rows.std(1).max().item(), 3)],
    )
    return score


if __name__ == "__main__":
    options, args = Options.parse(
        __doc__,
        minutes=8,
        extra=(
            ("--batch", {"type": int, "default": 16, "help": "clips per step"}),
            ("--clips", {"type": int, "default": 3072, "help": "clips kept on the device, 0.6 MB each"}),
            ("--refresh", {"type": int, "default": 4, "help": "clips replaced at every fourth step; 0: never"}),
            ("--decoder-only", {"action": "store_true", "help": "keep the encoder and with it all latents"}),
        ),
    )
    train(options, args.batch, args.clips, args.refresh, args.decoder_only)
