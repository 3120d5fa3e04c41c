"""Stage 3: renders and encodes random trajectories, the DiT's training data.

    python -m scripts.world.make_latents --minutes 2.5

Every trajectory is rendered in two looks. A file of the run's latents/ holds long ones (walks) and first chunks of
others (starts). Of each kind, for N trajectories of n latent frames:
    latents   [N, 2, z, n, h, w]   float16, normalised; the last channels are the place (place_channels.py)
    first     [N, 2, z, 3, h, w]   float16, the latents of the image condition in the first chunk
    later     [N, 2, z, 3, h, w]   float16, those in later chunks
    relative  [N, n, 4, 4]         float32, relative poses, scaled as in serving
    places    [N, n, 4]            float32, x, z, yaw and pitch (degrees) in the world
    looks     [N, 2]
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from lingbot_rt.models.checkpoint import CheckpointFolder
from lingbot_rt.models.i2v_condition import MASK_CHANNELS, condition_chunks, condition_video
from lingbot_rt.models.schedule import DistilledSchedule
from lingbot_rt.models.vae import channels_last
from scripts.world.config import CHUNK_FRAMES
from scripts.world.place_channels import write_places
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS
from scripts.world.train_vae import load_vae, video
from scripts.world.training_loop import Options, append_line
from scripts.world.trajectories import (
    Trajectory,
    hiding_view,
    make_trajectory,
    random_actions,
    start_view,
    step_back_actions,
    still_actions,
)
from scripts.world.whole_clip import encode, use_whole_clips

CHUNKS = 24
"""Per walk: as old as the errors of generated contexts become in self forcing."""

STARTS_PER_WALK = 4
"""A session's place must be read from its first picture, which takes more of these than there are walks: a model that
was right in all pictures it was trained on was one step of direction wrong in half of the others."""

STILL_SHARE = 0.08
"""Share of trajectories that press no key at all, for sessions that only look or have no camera control."""

HIDING_SHARE = 0.2
"""Share of trajectories that begin where a landmark hides near the camera, and step back: it rises and fills the
view. Most sessions that did not obey `s` began so."""

LONG_SHARE = 0.1
"""Share of the spells with keys that last up to 24 latent frames: full turns, and walks straight on."""

ENCODED_AT_ONCE = 8  # clips


def checkpoint(options: Options) -> CheckpointFolder:
    """The run's model/, of which some parts may not exist yet."""
    config = options.config
    schedule = DistilledSchedule(config.shift, config.steps, "of the run")
    return CheckpointFolder(options.model, config.dit, schedule, config.size)


class ClipEncoder:
    """The trained VAE's encoder: clips to normalised latents."""

    def __init__(self, options: Options) -> None:
        device = options.device
        self._vae = use_whole_clips(load_vae(options.model / "vae", options.config).to(device).eval())
        if device.type == "cuda":
            channels_last(self._vae)
        config = self._vae.config
        self._mean, self._std = (
            torch.tensor(config[name], device=device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )

    def __call__(self, clips: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> [B, z, F, h, w]."""
        parts = [encode(self._vae, part)[0] for part in clips.split(ENCODED_AT_ONCE)]
        return (torch.cat(parts) - self._mean) / self._std


def encode_trajectories(
    encoder: ClipEncoder, renderer: Renderer, rng: np.random.Generator, count: int, chunks: int
) -> dict[str, Tensor]:
    """``count`` trajectories of ``chunks`` chunks, as a file holds them."""
    frames = CHUNK_FRAMES * chunks
    trajectories = [_random_trajectory(rng, frames) for _ in range(count)]
    poses = np.stack([one.view.pixel_frames().poses() for one in trajectories])
    places = torch.from_numpy(np.stack([one.view.as_rows() for one in trajectories])).float()
    looks = torch.from_numpy(np.stack([rng.permutation(len(LOOKS))[:2] for _ in trajectories]))
    parts: dict[str, list[Tensor]] = {"latents": [], "first": [], "later": []}
    pictures = renderer.render(poses.reshape(-1, 4, 4), looks.repeat_interleave(poses.shape[1], dim=0))
    for in_one_look in pictures.unbind(1):
        clips = video(in_one_look.unflatten(0, poses.shape[:2]))
        latents = encoder(clips)
        write_places(latents, places.to(latents.device))
        first, later = condition_chunks(encoder(condition_video(clips[:, :, 0], CHUNK_FRAMES)))
        parts["latents"].append(latents)
        parts["first"].append(first[:, MASK_CHANNELS:])
        parts["later"].append(later[:, MASK_CHANNELS:])
    tensors = {name: torch.stack(tensors, 1).half().cpu() for name, tensors in parts.items()}
    return tensors | {
        "relative": torch.from_numpy(np.stack([one.relative for one in trajectories])).float(),
        "places": places,
        "looks": looks,
    }


def _random_trajectory(rng: np.random.Generator, frames: int) -> Trajectory:
    kind = rng.random()
    if kind < STILL_SHARE:
        return make_trajectory(start_view(rng), still_actions(frames))
    if kind < STILL_SHARE + HIDING_SHARE:
        return make_trajectory(hiding_view(rng), step_back_actions(rng, frames, LONG_SHARE))
    return make_trajectory(start_view(rng), random_actions(rng, frames, LONG_SHARE))


@torch.no_grad()
def make(options: Options, count: int, chunks: int = CHUNKS) -> None:
    """Adds files of ``count`` trajectories until the stage's minutes are spent or ``options.steps`` files are added.

    Every process does so, with walks and files of its own.
    """
    folder = options.run / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = ClipEncoder(options)
    renderer = Renderer(options.config.size, options.device, options.config.supersample)
    began, added = time.monotonic(), 0
    rank = options.ranks.rank
    number = len(list(folder.glob(f"{rank}-*.pt")))
    while time.monotonic() - began < 60 * options.minutes and (options.steps is None or added < options.steps):
        rng = np.random.default_rng((options.seed, 2, rank, number))
        walks = encode_trajectories(encoder, renderer, rng, count, chunks)
        starts = encode_trajectories(encoder, renderer, rng, STARTS_PER_WALK * count, 1)
        scratch = folder / f"{rank}-new"
        torch.save({"walks": walks, "starts": starts}, scratch)
        scratch.rename(folder / f"{rank}-{number:04}.pt")
        number, added = number + 1, added + 1
        frames = 2 * sum(len(kind["relative"]) * (4 * kind["relative"].shape[1] - 3) for kind in (walks, starts))
        rate = added * frames / (time.monotonic() - began)
        if options.ranks.is_first and (added < 4 or added % 16 == 0):
            append_line(options.run, {"stage": "latents", "files": number, "pictures_per_s": round(rate, 1)})


if __name__ == "__main__":
    options, args = Options.parse(
        __doc__, minutes=2.5, extra=(("--trajectories", {"type": int, "default": 8, "help": "walks per file"}),)
    )
    make(options, args.trajectories)
