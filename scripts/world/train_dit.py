"""Stages 4 to 6: the DiT, first taught with true contexts, then on its own roll-outs, then sharpened.

    python -m scripts.world.train_dit teacher --minutes 9
    python -m scripts.world.train_dit rollout --minutes 4
    python -m scripts.world.train_dit sharp --minutes 2.5

Each writes transformer/ of the run's model/ at its end, which is a whole checkpoint folder then; the later two begin
from the one that is there. All three take one kind of step: noisy chunks beside clean ones, the squared error of the
velocity. They differ in where the chunks come from. teacher: the truth, with noise of any level, contexts
a little noisy too. rollout: chunks that the model made by itself with the serving code, so that it learns to go on from
its own pictures; the world is the same every time, so what should have been there is known. sharp: the same, and a
discriminator that sees both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.engine.flow_match import shift_sigma
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder
from lingbot_rt.models.dit import CausalDiT, split_qkv
from scripts.world.bank import Bank, Sample
from scripts.world.config import WorldConfig
from scripts.world.export import complete
from scripts.world.forcing import forward, roll_out
from scripts.world.make_latents import checkpoint
from scripts.world.stage import Average, Options, Stage, append_line, learning_rate, save_part, set_rate

PHASES = ("teacher", "rollout", "sharp")
PEAK_RATE = {"teacher": 1.5e-3, "rollout": 4e-4, "sharp": 1.5e-4}
CONTEXT_NOISE = 0.25
"""The most noise that a clean context gets in teacher forcing, in half of the samples: its own will not be perfect."""

REUSE = 3
"""Steps that learn from one roll-out, each from other noise levels: rolling out costs about as much as a step."""

ADVERSARIAL_WEIGHT = 0.05
PENALTY_WEIGHT, PENALTY_NOISE = 1.0, 0.05


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from; sigma and weight [B, S]."""

    sample: Sample
    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    weight: Tensor


class Discriminator(nn.Module):
    """Judges chunks of latents [B, z, 3, h, w] cell by cell, by what is around each in space and time."""

    def __init__(self, z_dim: int, width: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, entry in enumerate((z_dim, width, width)):
            layers += [nn.Conv3d(entry, width, 3, stride=(1, 2, 2) if i == 1 else 1, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


class Teacher:
    """Samples of the bank, noised."""

    def __init__(self, bank: Bank, config: WorldConfig, batch: int) -> None:
        self._bank, self._config, self._batch = bank, config, batch
        self._served = torch.tensor([step.sigma for step in config.schedule.steps_for(len(config.steps))])

    def __call__(self, rng: np.random.Generator) -> Batch:
        sample = self._bank.sample(rng, self._batch, self._config.slots)
        truth = sample.latents
        shape, device = truth.shape[:2], truth.device
        anywhere = shift_sigma(torch.rand(shape).clamp(0.02, 1), self._config.shift)
        served = self._served[torch.randint(len(self._served), shape)]
        sigma = torch.where(torch.rand(shape) < 0.5, anywhere, served).to(device)
        amount = CONTEXT_NOISE * torch.rand(shape[0], device=device) * (torch.rand(shape[0], device=device) < 0.5)
        return Batch(sample, mix(truth, amount[:, None].expand(shape)), mix(truth, sigma), sigma, sample.weight)


class OwnRollouts:
    """The model's own sessions; each step picks one denoise step of every chunk."""

    def __init__(self, bank: Bank, config: WorldConfig, batch: int, dit: CausalDiT) -> None:
        self._bank, self._config, self._batch, self._dit = bank, config, batch, dit
        self._sigmas = torch.tensor([step.sigma for step in config.schedule.steps_for(len(config.steps))])
        self._uses = 0

    def __call__(self, rng: np.random.Generator) -> Batch:
        if self._uses % REUSE == 0:
            self._sample = self._bank.sample(rng, self._batch, self._config.slots, from_start=True)
            self._rollout = roll_out(self._dit, self._sample, self._config.schedule)
        self._uses += 1
        rollout = self._rollout
        shape, device = rollout.latents.shape[:2], rollout.latents.device
        step = torch.randint(len(self._sigmas), shape)
        sigma = self._sigmas[step].to(device)
        rows = step.to(device)[:, :, None, None, None, None, None].expand(-1, -1, 1, *rollout.latents.shape[2:])
        # The way from its own pictures to the truth, over a small sigma, is a long one: late steps would outweigh all.
        weight = (4 * sigma**2).clamp(max=1)
        return Batch(self._sample, rollout.latents, rollout.inputs.gather(2, rows)[:, :, 0], sigma, weight)


def mix(latents: Tensor, sigma_BS: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise, a level a chunk."""
    sigma = sigma_BS[:, :, None, None, None, None]
    return (1 - sigma) * latents + sigma * torch.randn_like(latents)


def predict(dit: CausalDiT, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and the predicted clean latents.

    The target is the velocity that leads to the truth, (x - truth) / sigma, also from inputs the model made itself.
    """
    sigma = batch.sigma[:, :, None, None, None, None]
    flow = forward(dit, batch.sample, batch.clean, batch.noisy, 1000 * batch.sigma).float()
    error = (flow - (batch.noisy - batch.sample.latents) / sigma).square().mean(dim=(2, 3, 4, 5))
    loss = (error * batch.weight).sum() / batch.weight.sum()
    return loss, batch.noisy - sigma * flow


def optimisers_of(dit: CausalDiT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for name, p in dit.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in dit.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=1e-3, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def fresh_dit(config: WorldConfig) -> CausalDiT:
    """Initial weights: what a block adds to its input, and the camera's effect, begin near nothing."""
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
    """The last steps' mean loss."""
    config, device = options.config, options.device
    folder = checkpoint(options)
    text = load_text_encoder(folder, torch.float32, device)
    bank = Bank(options.run / "latents", text, config.size, device, options.seed)
    torch.manual_seed(options.seed)
    begun = (options.model / "transformer" / "config.json").exists() and phase != "teacher"
    dit = (load_dit(folder, torch.float32, device) if begun else fresh_dit(config).to(device)).requires_grad_().train()
    dit.attention_backend = "sdpa"  # the choice that has a backward everywhere
    average = Average(dit)
    optimisers = optimisers_of(dit)
    parts = {"dit": dit, "average": average} | {f"optimiser{i}": each for i, each in enumerate(optimisers)}
    judge = Discriminator(config.z_dim).to(device) if phase == "sharp" else None
    if judge is not None:
        judge_optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-4, betas=(0.0, 0.95))
        parts |= {"judge": judge, "judge_optimiser": judge_optimiser}
    stage = Stage(phase, options, parts)
    source = Teacher(bank, config, batch) if phase == "teacher" else OwnRollouts(bank, config, batch, dit)
    if device.type == "cuda":
        dit.compile_blocks()
        torch._dynamo.config.recompile_limit = 64  # with and without gradients, in training's shapes and the roll-out's
    append_line(options.run, {"stage": phase, "walks": bank.walks, "from_checkpoint": begun, "at_step": stage.step})
    loss = torch.zeros(())
    for step in stage:
        set_rate(optimisers, learning_rate(stage, PEAK_RATE[phase], warm_steps=300 if phase == "teacher" else 50))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = source(np.random.default_rng((options.seed, PHASES.index(phase), step)))
            loss, latents = predict(dit, made)
        total = loss
        if judge is not None:
            got, true = latents.flatten(0, 1), made.sample.latents.flatten(0, 1)
            stage.note(judge=judge_step(judge, judge_optimiser, got.detach(), true))
            # Only where little noise is left does a prediction have edges to judge.
            late = (made.sigma < 0.7).flatten()
            fooled = F.softplus(judge(true) - judge(got)).mean(dim=(1, 2, 3, 4))
            adversarial = (fooled * late).sum() / late.sum().clamp_min(1)
            total = total + ADVERSARIAL_WEIGHT * adversarial
            stage.note(adversarial=adversarial)
        dit.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        average.update()
        error = (latents.detach() - made.sample.latents).square().mean(dim=(0, 2, 3, 4, 5))
        stage.note(loss=loss, grad=norm, x0_first=error[0], x0_last=error[-1])
    average.apply()
    save_part(options.model / "transformer", config.transformer, split_qkv(dit.state_dict()))
    complete(options.model, config)
    return loss.item()


def judge_step(judge: Discriminator, optimiser: torch.optim.Optimizer, got: Tensor, true: Tensor) -> Tensor:
    """The discriminator tells each true chunk from the one made in its place; small steps of its input must not sway it
    (a gradient penalty by differences on both, which keeps the game stable)."""
    real, fake = judge(true), judge(got)
    loss = F.softplus(fake - real).mean()
    for latents, score in ((true, real), (got, fake)):
        shaken = judge(latents + PENALTY_NOISE * torch.randn_like(latents))
        loss = loss + PENALTY_WEIGHT * (shaken - score).square().mean() / PENALTY_NOISE
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss


if __name__ == "__main__":
    options, said = Options.parse(
        __doc__,
        minutes=5,
        extra=(
            ("phase", {"choices": PHASES}),
            ("--batch", {"type": int, "default": 32, "help": "sessions a step"}),
        ),
    )
    train(options, said.phase, said.batch)
