"""Stages 4 to 6: trains the DiT by teacher forcing, then by self forcing, then by self forcing with a discriminator.

    python -m scripts.world.train_dit teacher --minutes 9
    python -m scripts.world.train_dit rollout --minutes 4
    python -m scripts.world.train_dit sharp --minutes 2.5

Each phase ends by writing transformer/ of the run's model/, which is then a whole checkpoint folder. rollout and sharp
start from the transformer/ that is there. All minimise the squared error of the velocity of noisy chunks, given clean
chunks as context. They differ in the chunks:

teacher   the true latents with noise of any level; contexts get a little noise too
rollout   chunks that the model generated with the serving code, so that it learns to continue from its own pictures;
          their true latents are known, because the world never changes
sharp     the same as rollout, plus the loss of a discriminator between true and predicted latents
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.engine.flow_match import shift_sigma
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder
from lingbot_rt.models.dit import CausalDiT, split_qkv
from scripts.world.config import WorldConfig
from scripts.world.export import complete
from scripts.world.make_latents import checkpoint
from scripts.world.self_forcing import roll_out
from scripts.world.teacher_forcing import forward
from scripts.world.training_data import TrajectoryBatch, TrajectoryDataset
from scripts.world.training_loop import (
    EMA,
    Options,
    TrainingLoop,
    append_line,
    learning_rate,
    save_part,
    set_learning_rate,
)

PHASES = ("teacher", "rollout", "sharp")
PEAK_RATE = {"teacher": 1.5e-3, "rollout": 4e-4, "sharp": 1.5e-4}
CONTEXT_NOISE = 0.25
"""Most noise in the contexts of teacher forcing, in half of the samples: generated contexts are imperfect too."""

STEPS_PER_ROLLOUT = 3
"""Steps that use one roll-out, each with other noise levels: a roll-out costs about as much as a step."""

ADVERSARIAL_WEIGHT = 0.05
PENALTY_WEIGHT, PENALTY_NOISE = 1.0, 0.05


@dataclass(frozen=True, slots=True)
class DenoisingBatch:
    """The data of one training step; sigma and weight [B, S]."""

    truth: TrajectoryBatch
    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    weight: Tensor


class Discriminator(nn.Module):
    """One logit per latent cell of a chunk [B, z, 3, h, w]: true or generated."""

    def __init__(self, z_dim: int, width: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, entry in enumerate((z_dim, width, width)):
            layers += [nn.Conv3d(entry, width, 3, stride=(1, 2, 2) if i == 1 else 1, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


class TeacherForcingBatches:
    """Batches of true chunks with noise."""

    def __init__(self, dataset: TrajectoryDataset, config: WorldConfig, batch: int) -> None:
        self._dataset, self._config, self._batch = dataset, config, batch
        self._served = torch.tensor([step.sigma for step in config.schedule.steps_for(len(config.steps))])

    def __call__(self, rng: np.random.Generator) -> DenoisingBatch:
        sample = self._dataset.sample(rng, self._batch, self._config.sample_chunks)
        truth = sample.latents
        shape, device = truth.shape[:2], truth.device
        anywhere = shift_sigma(torch.rand(shape).clamp(0.02, 1), self._config.shift)
        served = self._served[torch.randint(len(self._served), shape)]
        sigma = torch.where(torch.rand(shape) < 0.5, anywhere, served).to(device)
        amount = CONTEXT_NOISE * torch.rand(shape[0], device=device) * (torch.rand(shape[0], device=device) < 0.5)
        clean = add_noise(truth, amount[:, None].expand(shape))
        return DenoisingBatch(sample, clean, add_noise(truth, sigma), sigma, sample.weight)


class SelfForcingBatches:
    """Batches of generated chunks, each chunk at a random denoise step."""

    def __init__(self, dataset: TrajectoryDataset, config: WorldConfig, batch: int, dit: CausalDiT) -> None:
        self._dataset, self._config, self._batch, self._dit = dataset, config, batch, dit
        self._sigmas = torch.tensor([step.sigma for step in config.schedule.steps_for(len(config.steps))])
        self._uses = 0

    def __call__(self, rng: np.random.Generator) -> DenoisingBatch:
        if self._uses % STEPS_PER_ROLLOUT == 0:
            self._sample = self._dataset.sample(rng, self._batch, self._config.sample_chunks, from_start=True)
            self._rollout = roll_out(self._dit, self._sample, self._config.schedule)
        self._uses += 1
        rollout = self._rollout
        shape, device = rollout.latents.shape[:2], rollout.latents.device
        step = torch.randint(len(self._sigmas), shape)
        sigma = self._sigmas[step].to(device)
        rows = step.to(device)[:, :, None, None, None, None, None].expand(-1, -1, 1, *rollout.latents.shape[2:])
        # The target is an error divided by sigma: without this weight late steps would dominate the loss.
        weight = (4 * sigma**2).clamp(max=1)
        return DenoisingBatch(self._sample, rollout.latents, rollout.inputs.gather(2, rows)[:, :, 0], sigma, weight)


def add_noise(latents: Tensor, sigma_BS: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise, one sigma per chunk."""
    sigma = sigma_BS[:, :, None, None, None, None]
    return (1 - sigma) * latents + sigma * torch.randn_like(latents)


def velocity_loss(dit: CausalDiT, batch: DenoisingBatch) -> tuple[Tensor, Tensor]:
    """The loss and the predicted clean latents.

    The target is the velocity that leads to the true latents, (x - truth) / sigma, from generated inputs too.
    """
    sigma = batch.sigma[:, :, None, None, None, None]
    flow = forward(dit, batch.truth, batch.clean, batch.noisy, 1000 * batch.sigma).float()
    error = (flow - (batch.noisy - batch.truth.latents) / sigma).square().mean(dim=(2, 3, 4, 5))
    loss = (error * batch.weight).sum() / batch.weight.sum()
    return loss, batch.noisy - sigma * flow


def make_optimisers(dit: CausalDiT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all other parameters."""
    matrices = [p for name, p in dit.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in dit.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=1e-3, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def new_dit(config: WorldConfig) -> CausalDiT:
    """A DiT with small random weights; the head and the camera's scale start at zero."""
    dit = CausalDiT(config.dit)
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(parameter, std=0.02)
            if name.startswith("blocks."):
                parameter.data[:, (2, 5)] += 0.5
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.zeros_(dit.head.head.weight)
    for block in dit.blocks:
        nn.init.zeros_(block.cam_scale_layer.weight)
    return dit


def train(options: Options, phase: str, batch: int) -> float:
    """Trains one phase and returns the loss of its last step."""
    config, device = options.config, options.device
    folder = checkpoint(options)
    text = load_text_encoder(folder, torch.float32, device)
    dataset = TrajectoryDataset(options.run / "latents", text, config.size, device, options.seed)
    torch.manual_seed(options.seed)
    from_checkpoint = (options.model / "transformer" / "config.json").exists() and phase != "teacher"
    dit = load_dit(folder, torch.float32, device) if from_checkpoint else new_dit(config).to(device)
    dit.requires_grad_().train()
    dit.attention_backend = "sdpa"  # has a backward pass on every device
    ema = EMA(dit)
    optimisers = make_optimisers(dit)
    parts = {"dit": dit, "average": ema} | {f"optimiser{i}": each for i, each in enumerate(optimisers)}
    discriminator = Discriminator(config.z_dim).to(device) if phase == "sharp" else None
    if discriminator is not None:
        discriminator_optimiser = torch.optim.AdamW(discriminator.parameters(), lr=3e-4, betas=(0.0, 0.95))
        parts |= {"judge": discriminator, "judge_optimiser": discriminator_optimiser}
    loop = TrainingLoop(phase, options, parts)
    next_batch: Callable[[np.random.Generator], DenoisingBatch]
    if phase == "teacher":
        next_batch = TeacherForcingBatches(dataset, config, batch)
    else:
        next_batch = SelfForcingBatches(dataset, config, batch, dit)
    if device.type == "cuda":
        dit.compile_blocks()
        torch._dynamo.config.recompile_limit = 64  # with and without gradients, shapes of training and of roll-outs
    facts = {"trajectories": dataset.num_trajectories, "from_checkpoint": from_checkpoint, "at_step": loop.step}
    append_line(options.run, {"stage": phase} | facts)
    loss, warm_steps = torch.zeros(()), 300 if phase == "teacher" else 50
    for step in loop:
        set_learning_rate(optimisers, learning_rate(loop, PEAK_RATE[phase], warm_steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            data = next_batch(np.random.default_rng((options.seed, PHASES.index(phase), step)))
            loss, latents = velocity_loss(dit, data)
        total = loss
        if discriminator is not None:
            got, true = latents.flatten(0, 1), data.truth.latents.flatten(0, 1)
            loop.record(judge=discriminator_step(discriminator, discriminator_optimiser, got.detach(), true))
            # Predictions from much noise are blurred whatever the model does: only late steps count.
            late = (data.sigma < 0.7).flatten()
            fooled = F.softplus(discriminator(true) - discriminator(got)).mean(dim=(1, 2, 3, 4))
            adversarial = (fooled * late).sum() / late.sum().clamp_min(1)
            total = total + ADVERSARIAL_WEIGHT * adversarial
            loop.record(adversarial=adversarial)
        dit.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        ema.update()
        error = (latents.detach() - data.truth.latents).square().mean(dim=(0, 2, 3, 4, 5))
        loop.record(loss=loss, grad=norm, x0_first=error[0], x0_last=error[-1])
    ema.apply()
    save_part(options.model / "transformer", config.transformer, split_qkv(dit.state_dict()))
    complete(options.model, config)
    return loss.item()


def discriminator_step(
    discriminator: Discriminator, optimiser: torch.optim.Optimizer, got: Tensor, true: Tensor
) -> Tensor:
    """One step of the discriminator: a relativistic loss on each true chunk and the generated one in its place.

    Finite differences give a gradient penalty at both, which keeps the training stable.
    """
    real, fake = discriminator(true), discriminator(got)
    loss = F.softplus(fake - real).mean()
    for latents, score in ((true, real), (got, fake)):
        shifted = discriminator(latents + PENALTY_NOISE * torch.randn_like(latents))
        loss = loss + PENALTY_WEIGHT * (shifted - score).square().mean() / PENALTY_NOISE
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss


if __name__ == "__main__":
    options, args = Options.parse(
        __doc__,
        minutes=5,
        extra=(
            ("phase", {"choices": PHASES}),
            ("--batch", {"type": int, "default": 32, "help": "sessions per step"}),
        ),
    )
    train(options, args.phase, args.batch)
