"""Stage 3: walks through the world, rendered and encoded once, for the DiT to train on.

    python -m scripts.world.make_latents --minutes 2.5

Each walk is seen in two looks. A file of the run's latents/ holds, for W walks of n latent frames:
    latents   [W, 2, z, n, h, w]  float16, normalised        first, later  [W, 2, z, 3, h, w]  the image conditions
    relative  [W, n, 4, 4]        as the serving code scales them     looks  [W, 2]
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from lingbot_rt.models.checkpoint import CheckpointFolder, load_vae
from lingbot_rt.models.i2v_condition import MASK_CHANNELS
from lingbot_rt.models.vae import StreamingVAE
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS
from scripts.world.stage import Options, append_line
from scripts.world.train_vae import video
from scripts.world.walks import random_actions, start_view, walk

CHUNKS = 12


def checkpoint(options: Options) -> CheckpointFolder:
    """The run's model/ as far as it is there."""
    config = options.config
    return CheckpointFolder(options.model, config.dit, config.shift, config.steps, config.size)


def encode_walks(
    vae: StreamingVAE, renderer: Renderer, rng: np.random.Generator, walks: int, chunks: int
) -> dict[str, Tensor]:
    """One file's content."""
    made = [walk(start_view(rng), random_actions(rng, 3 * chunks)) for _ in range(walks)]
    poses = np.stack([one.view.between().poses() for one in made])
    looks = torch.from_numpy(np.stack([rng.permutation(len(LOOKS))[:2] for _ in made]))
    found: dict[str, list[Tensor]] = {"latents": [], "first": [], "later": []}
    for i in range(2):
        look_of_frame = looks[:, i].repeat_interleave(poses.shape[1])
        pictures = renderer.render(poses.reshape(-1, 4, 4), look_of_frame)
        clips = video(pictures.unflatten(0, poses.shape[:2]))
        found["latents"].append(vae.encode(clips))
        first, later = vae.encode_condition(clips[:, :, 0], 3)
        found["first"].append(first[:, MASK_CHANNELS:])
        found["later"].append(later[:, MASK_CHANNELS:])
    tensors = {name: torch.stack(parts, 1).half().cpu() for name, parts in found.items()}
    return tensors | {"relative": torch.from_numpy(np.stack([one.relative for one in made])).float(), "looks": looks}


@torch.no_grad()
def make(options: Options, walks: int, chunks: int = CHUNKS) -> None:
    """Adds files until the stage's time is over, or ``options.steps`` of them."""
    folder = options.run / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_vae(checkpoint(options), torch.float32, options.device)
    renderer = Renderer(options.config.size, options.device, options.config.supersample)
    began, made = time.monotonic(), 0
    number = len(list(folder.glob("*.pt")))
    while time.monotonic() - began < 60 * options.minutes and (options.steps is None or made < options.steps):
        tensors = encode_walks(vae, renderer, np.random.default_rng((options.seed, 2, number)), walks, chunks)
        scratch = folder / "new"
        torch.save(tensors, scratch)
        scratch.rename(folder / f"{number:04}.pt")
        number, made = number + 1, made + 1
        frames = 2 * tensors["relative"].shape[0] * (4 * (3 * chunks - 1) + 1)
        rate = made * frames / (time.monotonic() - began)
        append_line(options.run, {"stage": "latents", "files": number, "pictures_per_s": round(rate, 1)})


if __name__ == "__main__":
    options, said = Options.parse(
        __doc__, minutes=2.5, extra=(("--walks", {"type": int, "default": 16, "help": "of a file"}),)
    )
    make(options, said.walks)
