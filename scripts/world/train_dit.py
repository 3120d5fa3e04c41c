"""Stages 4 to 6: trains the DiT by teacher forcing, then by self forcing, then by self forcing with a discriminator.

    python -m scripts.world.train_dit teacher --minutes 9
    python -m scripts.world.train_dit rollout --minutes 4
    python -m scripts.world.train_dit sharp --minutes 2.5

Each phase ends by writing transformer/ of the run's model/, which is then a whole checkpoint folder. It starts from the
transformer/ that is there, if any. All minimise the squared error of the velocity of noisy chunks, given clean chunks
as context. They differ in the chunks:

teacher   the true latents with noise of any level; contexts are worn, some of them to next to nothing
rollout   chunks that the model generated with the serving code, so that it learns to continue from its own pictures;
          their true latents are known, because the world never changes. Half of the sessions are at their beginning,
          the others anywhere in the world long after it; these continue from what earlier roll-outs made there
sharp     the same as rollout, plus the loss of a discriminator between true and predicted latents
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_rt.engine.flow_match import FlowSchedule, shift_sigma
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder
from lingbot_rt.models.dit import CausalDiT, split_qkv
from scripts.world.captured import Captured
from scripts.world.config import WorldConfig
from scripts.world.export import complete
from scripts.world.make_latents import checkpoint
from scripts.world.muon import muon_and_adamw
from scripts.world.place_channels import PLACE_CHANNELS, disturb_cells, token_means
from scripts.world.pose_reader import PoseReader
from scripts.world.ranks import Ranks
from scripts.world.self_forcing import FAR_POSITION, GeneratedChunks, Rollout, roll_out
from scripts.world.teacher_forcing import forward, run_layer
from scripts.world.training_data import SampleIndices, TrajectoryBatch, TrajectoryDataset
from scripts.world.training_loop import (
    EMA,
    Options,
    Stateful,
    TrainingLoop,
    learning_rate,
    save_part,
    set_learning_rate,
)

PHASES = ("teacher", "rollout", "sharp")
PEAK_RATE = {"teacher": 1.5e-3, "rollout": 4e-4, "sharp": 1.5e-4}
CONTEXT_NOISE = 0.7
"""Most noise in the contexts of teacher forcing, in half of the other samples, mostly far less: generated contexts are
imperfect too."""

FADED_SHARE = 0.5
"""Share of the samples in teacher forcing whose contexts show next to nothing but the session's first chunk. As in a
roll-out that blurs, they tell the place, and what stands there must be drawn from memory alone."""

SERVED_SHARE = 0.7
"""Share of the noise levels in teacher forcing that are those of the schedule; the others are anywhere."""

FIRST_STEP_SHARE = 0.65
"""Of those, the share of the first step's: from noise alone, what a chunk shows must come from memory."""

POSE_WEIGHT = 0.5
"""Of the loss of PoseReader."""

PLACE_WEIGHT = 5.0
"""Of the place channels' error: it adds up from chunk to chunk, so it must become far smaller than the pictures'."""

LEFT_NOISE = 0.75
"""Deviation of the noise that denoising leaves within a token's place channels."""

ROLLOUT_CHUNKS = 7
"""Per session: longer ones drift so far from the true walk that their truth teaches blur."""

MOST_GIVEN = 3
"""Chunks that a roll-out is given at its beginning, at most. Far sessions always get so many: the window's contents."""

TRUE_SHARE = 0.25
"""Share of the far sessions that are given true chunks, in place of what the model made of them earlier."""

STEPS_PER_ROLLOUT = 3
"""Steps that use one roll-out, each with other noise levels: a roll-out costs about as much as a step."""

ADVERSARIAL_WEIGHT = 0.15
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
    """One logit per latent cell of a chunk [B, channels, 3, h, w]: true or generated."""

    def __init__(self, channels: int, width: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, entry in enumerate((channels, width, width)):
            layers += [nn.Conv3d(entry, width, 3, stride=(1, 2, 2) if i == 1 else 1, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


def teacher_forcing_batch(truth: TrajectoryBatch, schedule: FlowSchedule) -> DenoisingBatch:
    """True chunks with noise, given worn contexts."""
    sigma = noise_levels(truth.latents.shape[:2], schedule, truth.latents.device)
    clean = worn_contexts(truth.latents)
    return DenoisingBatch(truth, clean, add_noise(truth.latents, sigma), sigma, truth.weight)


def noise_levels(shape: torch.Size, schedule: FlowSchedule, device: torch.device) -> Tensor:
    """Random sigmas for teacher forcing: those of the schedule, most of them the first, or any."""
    anywhere = shift_sigma(torch.rand(shape, device=device).clamp(0.02, 1), schedule.shift)
    first, *later = served_sigmas(schedule, device).split(1)
    is_later = torch.rand(shape, device=device) >= FIRST_STEP_SHARE
    served = torch.where(is_later, pick(torch.cat(later), shape), first) if later else first
    return torch.where(torch.rand(shape, device=device) < SERVED_SHARE, served, anywhere)


def worn_contexts(latents: Tensor) -> Tensor:
    """True chunks [B, S, z, 3, h, w] with pictures as poor as generated ones get. Their places stay right."""
    pictures, places = latents.split([latents.shape[2] - PLACE_CHANNELS, PLACE_CHANNELS], dim=2)
    count, chunks, device = *latents.shape[:2], latents.device
    noise = CONTEXT_NOISE * torch.rand(count, device=device) ** 2 * (torch.rand(count, device=device) < 0.5)
    is_faded = torch.rand(count, device=device) < FADED_SHARE
    fade = torch.where(is_faded, 0.7 + 0.3 * torch.rand(count, device=device), noise)
    # At least half as much as is missing: a network undoes what only gets weaker.
    noise = torch.where(is_faded, fade * (0.5 + 0.5 * torch.rand(count, device=device)), noise)
    # The first chunk stays: the sink keeps showing the session's first picture.
    later = (torch.arange(chunks, device=device) > 0) | ~is_faded[:, None]
    fade, noise = ((level[:, None] * later)[:, :, None, None, None, None] for level in (fade, noise))
    worn = (1 - fade) * pictures + noise * torch.randn_like(pictures)
    return disturb_cells(torch.cat([worn, places], dim=2), LEFT_NOISE)


def self_forcing_batch(truth: TrajectoryBatch, rollout: Rollout, schedule: FlowSchedule) -> DenoisingBatch:
    """Generated chunks, each at a random denoise step."""
    shape, device = rollout.latents.shape[:2], rollout.latents.device
    sigmas = served_sigmas(schedule, device)
    step = torch.randint(len(sigmas), shape, device=device)
    rows = step[:, :, None, None, None, None, None].expand(-1, -1, 1, *rollout.latents.shape[2:])
    sigma = sigmas[step]
    # The target is an error divided by sigma: without this weight late steps would dominate the loss.
    weight = (4 * sigma**2).clamp(max=1)
    return DenoisingBatch(truth, rollout.latents, rollout.inputs.gather(2, rows)[:, :, 0], sigma, weight)


@lru_cache
def served_sigmas(schedule: FlowSchedule, device: torch.device) -> Tensor:
    return torch.tensor([step.sigma for step in schedule.steps_for(len(schedule.steps))], device=device)


def pick(values: Tensor, shape: torch.Size) -> Tensor:
    """Random entries of ``values``."""
    return values[torch.randint(len(values), shape, device=values.device)]


def add_noise(latents: Tensor, sigma_BS: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise, one sigma per chunk."""
    sigma = sigma_BS[:, :, None, None, None, None]
    return (1 - sigma) * latents + sigma * torch.randn_like(latents)


def velocity_loss(
    dit: CausalDiT, batch: DenoisingBatch, layer: Callable[..., Tensor] = run_layer
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, the predicted clean latents and the tokens after each layer.

    The target is the velocity that leads to the true latents, (x - truth) / sigma, from generated inputs too.
    """
    sigma = batch.sigma[:, :, None, None, None, None]
    flow, hidden = forward(dit, batch.truth, batch.clean, batch.noisy, 1000 * batch.sigma, layer)
    flow = flow.float()
    pictures, places = errors_of_chunks(flow - (batch.noisy - batch.truth.latents) / sigma)
    error = pictures + PLACE_WEIGHT * places
    loss = (error * batch.weight).sum() / batch.weight.sum()
    return loss, batch.noisy - sigma * flow, hidden


def errors_of_chunks(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors [B, S] of the pictures' channels, and of the place channels' means over tokens."""
    pictures, places = difference.split([difference.shape[2] - PLACE_CHANNELS, PLACE_CHANNELS], dim=2)
    return tuple(part.square().mean(dim=(2, 3, 4, 5)) for part in (pictures, token_means(places)))  # type: ignore[return-value]


def make_optimisers(dit: CausalDiT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all other parameters."""
    return muon_and_adamw(dit, lambda name, p: name.startswith("blocks.") and p.ndim == 2, betas=(0.9, 0.95))


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


class Phase:
    """One phase's networks and data, and the functions that a step consists of.

    The functions keep their results, because on an accelerator they are captured once and replayed.
    """

    def __init__(self, phase: str, dit: CausalDiT, dataset: TrajectoryDataset, config: WorldConfig, batch: int) -> None:
        self.phase, self.dit, self._dataset, self._config, self._batch = phase, dit, dataset, config, batch
        device = dit.head.head.weight.device
        self.pose_reader = PoseReader(config.dit.dim, config.dit.num_layers).to(device)
        self.discriminator = Discriminator(config.picture_channels).to(device) if phase == "sharp" else None
        self._indices = self._draw(np.random.default_rng(0)).to(device)
        self._generate, self._gradients = Captured(self._roll_out, device), Captured(self._forward_backward, device)
        self._autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
        self._layer = run_layer if device.type == "cpu" else torch.compile(run_layer, dynamic=False)
        self._steps = 0
        self._made = None if phase == "teacher" else GeneratedChunks(dataset)

    def step(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Sets the gradients of one batch and returns its figures."""
        if self.phase == "teacher":
            self._indices.copy_(self._draw(rng))
        elif self._steps % STEPS_PER_ROLLOUT == 0:
            self._indices.copy_(self._draw(rng))
            self._generate()
        self._steps += 1
        return self._gradients()

    def _draw(self, rng: np.random.Generator) -> SampleIndices:
        chunks = self._config.sample_chunks
        if self.phase == "teacher":
            return self._dataset.draw(rng, self._batch, chunks)
        chunks, half = min(ROLLOUT_CHUNKS, chunks), self._batch // 2
        near = self._dataset.draw(rng, self._batch - half, chunks, far_share=0)
        far = self._dataset.draw(rng, half, chunks, far_share=1, far_position=FAR_POSITION)
        return SampleIndices.joined([near, far])

    def _roll_out(self) -> dict[str, Tensor]:
        assert self._made is not None
        half, device = self._batch // 2, self.dit.head.head.weight.device
        near, far = slice(0, -half), slice(-half, None)
        known = torch.full((self._batch,), MOST_GIVEN, device=device)
        known[near] = torch.randint(MOST_GIVEN + 1, (self._batch - half,), device=device)
        is_true = torch.rand(self._batch, device=device) < TRUE_SHARE
        is_true[near] = True
        with self._autocast():
            truth = self._truth = self._dataset.gather(self._indices)
            given = torch.where(
                is_true[:, None, None, None, None, None], truth.latents, self._made.gather(self._indices)
            )
            given[:, 0] = truth.latents[:, 0]  # the sink shows the session's first picture
            # However old a picture's errors are, its place is right, and so is what must be drawn next.
            given[:, :, -PLACE_CHANNELS:] = truth.latents[:, :, -PLACE_CHANNELS:]
            self._rollout = Rollout.joined(
                [
                    roll_out(
                        self.dit,
                        truth.sessions(some),
                        self._config.schedule,
                        given=given[some],
                        given_B=known[some],
                        position=position,
                    )
                    for some, position in ((near, 1), (far, FAR_POSITION))
                ]
            )
        self._made.put(self._indices, self._rollout.latents, known)
        return {}

    def _forward_backward(self) -> dict[str, Tensor]:
        self.dit.zero_grad(set_to_none=True)
        with self._autocast():
            if self.phase == "teacher":
                data = teacher_forcing_batch(self._dataset.gather(self._indices), self._config.schedule)
            else:
                data = self_forcing_batch(self._truth, self._rollout, self._config.schedule)
            loss, latents, hidden = velocity_loss(self.dit, data, self._layer)
        pictures, places = (part.mean(dim=0) for part in errors_of_chunks(latents.detach() - data.truth.latents))
        figures = {"loss": loss.detach(), "x0_first": pictures[0], "x0_last": pictures[-1]}
        figures |= {"place_first": places[0], "place_last": places[-1]}
        known, told = self.pose_reader.loss(hidden, data.truth.places, data.truth.weight)
        figures |= {"pose_clean": known[-1].detach(), "pose_noisy": told[-1].detach(), "pose_early": told[0].detach()}
        loss = loss + POSE_WEIGHT * (known + told).mean() / 2
        self.pose_reader.zero_grad(set_to_none=True)
        parameters = [*self.dit.parameters(), *self.pose_reader.parameters()]
        if self.discriminator is not None:
            got, true = (part.flatten(0, 1)[:, :-PLACE_CHANNELS] for part in (latents, data.truth.latents))
            # Predictions from much noise are blurred whatever the model does: only late steps count.
            late = (data.sigma < 0.7).flatten()
            fooled = F.softplus(self.discriminator(true) - self.discriminator(got)).mean(dim=(1, 2, 3, 4))
            adversarial = (fooled * late).sum() / late.sum().clamp_min(1)
            loss = loss + ADVERSARIAL_WEIGHT * adversarial
            self.discriminator.zero_grad(set_to_none=True)
            judge = discriminator_loss(self.discriminator, got.detach(), true)
            judge.backward()
            figures |= {"adversarial": adversarial.detach(), "judge": judge.detach()}
        loss.backward(inputs=parameters)
        return figures


def train(options: Options, phase: str, batch: int) -> float:
    """Trains one phase and returns the loss of its last step."""
    config, device = options.config, options.device
    folder = checkpoint(options)
    text = load_text_encoder(folder, torch.float32, device)
    dataset = TrajectoryDataset(options.run / "latents", text, device, options.seed)
    torch.manual_seed(options.seed)
    from_checkpoint = (options.model / "transformer" / "config.json").exists()
    dit = load_dit(folder, torch.float32, device) if from_checkpoint else new_dit(config).to(device)
    dit.requires_grad_().train()
    dit.attention_backend = "sdpa"  # has a backward pass on every device
    ema = EMA(dit)
    optimisers = make_optimisers(dit)
    parts: dict[str, Stateful] = {"dit": dit, "average": ema}
    parts |= {f"optimiser{i}": each for i, each in enumerate(optimisers)}
    work = Phase(phase, dit, dataset, config, batch)
    reader = work.pose_reader
    if (trained_reader := options.run / "state" / "pose_reader.pt").exists():
        reader.load_state_dict(torch.load(trained_reader, map_location=device, weights_only=True))
    optimisers.append(torch.optim.AdamW(reader.parameters(), betas=(0.9, 0.95)))
    parts |= {"reader": reader, "reader_optimiser": optimisers[-1]}
    judges: list[torch.optim.Optimizer] = []
    if work.discriminator is not None:
        judges = [torch.optim.AdamW(work.discriminator.parameters(), lr=3e-4, betas=(0.0, 0.95))]
        parts |= {"judge": work.discriminator, "judge_optimiser": judges[0]}
    loop = TrainingLoop(phase, options, parts)
    if device.type == "cuda":
        dit.compile_blocks()
        torch._dynamo.config.recompile_limit = 64  # with and without gradients, shapes of training and of roll-outs
    loop.log(trajectories=dataset.num_trajectories, from_checkpoint=from_checkpoint)
    ranks: Ranks = options.ranks
    networks: list[nn.Module] = [dit, reader] if work.discriminator is None else [dit, reader, work.discriminator]
    ranks.share_weights(*networks)
    loss, warm_steps = torch.zeros(()), 300 if phase == "teacher" else 50
    for step in loop:
        set_learning_rate(optimisers, learning_rate(loop, PEAK_RATE[phase], warm_steps))
        figures = work.step(np.random.default_rng((options.seed, PHASES.index(phase), step, ranks.rank)))
        loss = figures["loss"]
        ranks.average_gradients(parameter for network in networks for parameter in network.parameters())
        norm = nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        for optimiser in (*optimisers, *judges):
            optimiser.step()
        ema.update()
        loop.record(**figures, grad=norm)
    ema.apply()
    if ranks.is_first:
        torch.save(reader.state_dict(), trained_reader)
        save_part(options.model / "transformer", config.transformer, split_qkv(dit.state_dict()))
        complete(options.model, config)
    return loss.item()


def discriminator_loss(discriminator: Discriminator, got: Tensor, true: Tensor) -> Tensor:
    """A relativistic loss on each true chunk and the generated one in its place.

    Finite differences give a gradient penalty at both, which keeps the training stable.
    """
    real, fake = discriminator(true), discriminator(got)
    loss = F.softplus(fake - real).mean()
    for latents, score in ((true, real), (got, fake)):
        shifted = discriminator(latents + PENALTY_NOISE * torch.randn_like(latents))
        loss = loss + PENALTY_WEIGHT * (shifted - score).square().mean() / PENALTY_NOISE
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
