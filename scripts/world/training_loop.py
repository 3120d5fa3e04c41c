"""What all training stages share: command line, time limit, saved state, log, EMA, learning rate, weight files.

A run is a folder (runs/world):
    model/            the checkpoint folder; each stage writes its part and reads those of earlier stages
    state/STAGE.pt    what a stage needs to resume: weights, EMA, optimisers, generator, seconds spent
    log.jsonl         one line of figures every few seconds, with the name of its stage
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.world.config import CONFIGS, WorldConfig
from scripts.world.ranks import Ranks

MAX_FILE_BYTES = 15 * 2**20
"""Limit per safetensors file; larger parts become shards with an index."""


@dataclass
class Options:
    """The command line of a stage."""

    run: Path
    config: WorldConfig
    device: torch.device
    minutes: float = 1.0
    steps: int | None = None  # most steps of this call
    pause_after: float = math.inf  # most minutes of this call
    seed: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def model(self) -> Path:
        return self.run / "model"

    @classmethod
    def parse(
        cls, description: str, minutes: float, extra: Sequence[tuple[str, dict[str, Any]]] = ()
    ) -> tuple[Options, argparse.Namespace]:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument(
            "--run-folder",
            dest="run",
            type=Path,
            default=Path("runs/world"),
            help="the run's folder (default: runs/world)",
        )
        parser.add_argument(
            "--config", choices=CONFIGS, default="full", help="small learns on a CPU, tiny is for tests (default: full)"
        )
        parser.add_argument(
            "--minutes", type=float, default=minutes, help=f"of the whole stage, over all calls (default: {minutes})"
        )
        parser.add_argument("--steps", type=int, help="most steps of this call; a later call resumes")
        parser.add_argument(
            "--pause-after", type=float, default=math.inf, metavar="MINUTES", help="most minutes of this call"
        )
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        for name, settings in extra:
            parser.add_argument(name, **settings)
        args = parser.parse_args()
        ranks = Ranks.join(args.device)
        options = cls(
            args.run,
            CONFIGS[args.config],
            torch.device(args.device),
            args.minutes,
            args.steps,
            args.pause_after,
            args.seed,
            ranks,
        )
        return options, args


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class TrainingLoop:
    """Iterates over step numbers until the stage's minutes are spent. Saves ``parts`` and resumes from the saved state.

    ``progress`` is the share of the minutes that is spent. Learning rates follow it, so a stage of any length anneals
    to its end. All processes have the first one's progress, and only the first saves and logs.
    """

    SAVE_EVERY_S = 90.0
    LOG_EVERY_S = 5.0

    def __init__(self, name: str, options: Options, parts: Mapping[str, Stateful]) -> None:
        self.name, self._options, self._parts = name, options, parts
        self._file = options.run / "state" / f"{name}.pt"
        self.step = 0
        self.progress = 0.0
        self._spent = 0.0
        self._figures: dict[str, list[Tensor]] = {}
        if self._file.exists():
            # Load on the host: each part moves its tensors to its device, and an optimiser's counters stay on the host.
            state = torch.load(self._file, map_location="cpu", weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(state["parts"][key])
            self.step, self._spent = state["step"], state["spent"]
            torch.set_rng_state(state["rng"])
        else:
            torch.manual_seed(options.seed)
        if not options.ranks.is_first:  # its own noise
            torch.manual_seed(options.seed + 1009 * options.ranks.rank + self.step)
        self._began = self._logged = time.monotonic()
        self._logged_step = self.step

    @property
    def seconds(self) -> float:
        """Seconds spent on the stage, including earlier calls."""
        return self._spent + time.monotonic() - self._began

    def __iter__(self) -> TrainingLoop:
        self._began = self._logged = self._saved = time.monotonic()
        self._last_step = math.inf if self._options.steps is None else self.step + self._options.steps
        self._logged_step = self.step
        return self

    def __next__(self) -> int:
        now = time.monotonic()
        paused = self.step >= self._last_step or now - self._began > 60 * self._options.pause_after
        share = math.inf if paused else self.seconds / (60 * self._options.minutes)
        share = self._options.ranks.from_first(share)
        self.progress = min(1.0, share)
        if share >= 1:
            self.log()
            self.save()
            raise StopIteration
        if now - self._logged > self.LOG_EVERY_S:
            self.log()
        if now - self._saved > self.SAVE_EVERY_S:
            self.save()
        self.step += 1
        return self.step - 1

    def record(self, **figures: Tensor) -> None:
        """Adds a step's figures to the means of the next log line. Does not wait for the device."""
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(value.detach().float().clone())  # graphs reuse it

    def log(self, **figures: Any) -> None:
        """Writes a line to log.jsonl and to the terminal."""
        if not self._options.ranks.is_first:
            self._figures = {}
            return
        now = time.monotonic()
        means = {name: round(torch.stack(values).mean().item(), 6) for name, values in self._figures.items()}
        self._figures = {}
        rate = (self.step - self._logged_step) / max(now - self._logged, 1e-9)
        line = {"stage": self.name, "step": self.step, "seconds": round(self.seconds, 3), "steps_per_s": round(rate, 2)}
        append_line(self._options.run, line | means | figures)
        self._logged, self._logged_step = now, self.step

    def save(self) -> None:
        if not self._options.ranks.is_first:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "parts": {key: part.state_dict() for key, part in self._parts.items()},
            "step": self.step,
            "spent": self.seconds,
            "rng": torch.get_rng_state(),
        }
        scratch = self._file.with_suffix(".new")
        torch.save(state, scratch)
        scratch.rename(self._file)
        self._saved = time.monotonic()


def append_line(run: Path, figures: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures)
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, flush=True)


@dataclass
class EMA:
    """An exponential moving average of a module's parameters, in float32. Its values are the weights that are kept."""

    module: nn.Module
    decay: float = 0.999
    values: list[Tensor] = field(init=False)
    updates: int = 0

    def __post_init__(self) -> None:
        self.values = [parameter.detach().clone() for parameter in self.module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        # A smaller decay at first, so that the initial weights are forgotten.
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(self.values, list(self.module.parameters()), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the module's parameters to their averages."""
        for parameter, value in zip(self.module.parameters(), self.values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
        self.updates = state["updates"]


def learning_rate(loop: TrainingLoop, peak: float, warm_steps: int = 200, hold: float = 0.35) -> float:
    """Linear warm-up over steps, then ``peak``, then a cosine down to 2 % of it at the end of the stage's minutes."""
    fall = max(0.0, (loop.progress - hold) / (1 - hold))
    return peak * min(1.0, (loop.step + 1) / warm_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


def set_learning_rate(optimisers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)


def save_part(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], name: str = "diffusion_pytorch_model"
) -> None:
    """Writes config.json and float16 weights in files of at most MAX_FILE_BYTES. Raises ValueError on overflow."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for key, value in state.items():
        half = value.detach().to("cpu", torch.float16).contiguous()
        if not half.isfinite().all():
            raise ValueError(f"{key} does not fit float16: the largest value is {value.abs().max().item():g}")
        if shard_bytes + half.nbytes > MAX_FILE_BYTES and shards[-1]:
            shards.append({})
            shard_bytes = 0
        shards[-1][key] = half
        shard_bytes += half.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{name}.safetensors")
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": weight_map,
    }
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
