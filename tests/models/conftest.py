"""The golden DiT, its inputs, and a plain roll-out loop over the package's own modules."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lingbot_rt.engine.flow_match import FlowSchedule, predict_x0, renoise
from lingbot_rt.errors import CheckpointError
from lingbot_rt.models.checkpoint import CheckpointFolder, load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.dit import CausalDiT, DiTConfig
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.schedule import DistilledSchedule
from lingbot_rt.shapes import FrameSize

FRAMES = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def model(golden, tmp_path) -> Path:
    """A copy of the golden model that a test may break."""
    return Path(shutil.copytree(golden("e2e/model"), tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict], Any]) -> None:
    """Passes a JSON file's object, or a safetensors file's tensors, through ``change``."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def load_all(model_path: str | Path) -> None:
    """Loads every part of a model, as a start does."""
    folder = open_checkpoint(str(model_path))
    for load in (load_dit, load_vae, load_text_encoder):
        load(folder, torch.float32, CPU)


def refusal(model_path: str | Path) -> str:
    """The message with which a model is refused: one printable line."""
    with pytest.raises(CheckpointError) as caught:
        load_all(model_path)
    message = str(caught.value)
    assert message.isprintable()
    assert " at 0x" not in message
    return message


@pytest.fixture(scope="session")
def dit_folder(golden, tmp_path_factory) -> CheckpointFolder:
    """tests/golden/dit as the transformer/ of a checkpoint folder."""
    path = tmp_path_factory.mktemp("checkpoint")
    (path / "transformer").mkdir()
    (path / "transformer" / "diffusion_pytorch_model.safetensors").symlink_to(golden("dit/weights.safetensors"))
    values = json.loads(golden("dit/config.json").read_text())
    return CheckpointFolder(
        path=path,
        dit_config=DiTConfig.from_dict(values),
        schedule=DistilledSchedule(values["flow_shift"], tuple(values["dmd_denoising_steps"]), "stated"),
        default_size=FrameSize(96, 64),
    )


@pytest.fixture(scope="session")
def dit(dit_folder) -> CausalDiT:
    return load_dit(dit_folder, torch.float32, CPU)


@pytest.fixture(scope="session")
def arrays(golden) -> Callable[[str], dict[str, torch.Tensor]]:
    """``arrays("dit/rollout_main_inputs")`` -> the arrays of a golden npz as tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(golden(f"{name}.npz")) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}

    return load


def new_cache(
    dit: CausalDiT,
    sink: int = 3,
    window: int = 9,
    tokens: int = 24,
    dtype: torch.dtype | None = None,
    recent: tuple[int, ...] = (),
) -> KVCache:
    return KVCache(
        num_layers=dit.config.num_layers,
        num_heads=dit.config.num_attention_heads,
        head_dim=dit.config.attention_head_dim,
        tokens_per_frame=tokens,
        sink_frames=sink,
        window_frames=window,
        dtype=dtype or next(dit.parameters()).dtype,
        device=next(dit.parameters()).device,
        recent_frames=recent,
    )


@dataclasses.dataclass
class Rollout:
    """Runs golden chunks one after the other; ``flows`` and ``x0s`` hold the newest chunk's predictions."""

    dit: CausalDiT
    inputs: dict[str, torch.Tensor]
    cache: KVCache
    schedule: FlowSchedule = dataclasses.field(default_factory=lambda: FlowSchedule(10.0, (1000, 821, 642, 321)))
    camera: bool = True
    prompts: dict[int, str] = dataclasses.field(default_factory=lambda: {0: "prompt_embeds"})

    def __post_init__(self) -> None:
        self.dtype = next(self.dit.parameters()).dtype
        self.text_kv = None
        self.chunk = 0

    def step(self) -> torch.Tensor:
        """The next chunk's latents [1, 16, 3, 8, 12]."""
        i = self.chunk
        if i in self.prompts:
            self.text_kv = self.dit.text_kv(self.inputs[self.prompts[i]].to(self.dtype))
        rays = self.inputs["plucker"][i].to(self.dtype)
        modulation = self.dit.camera_modulation(rays) if self.camera else None
        condition = self.inputs["condition"].chunk(2, dim=2)[min(i, 1)]
        x, self.flows, self.x0s = self.inputs["init_noise"][i], [], []
        steps = self.schedule.steps_for(len(self.schedule.steps))

        def forward(latents: torch.Tensor, timestep: float, commit: bool = False):
            channels = torch.cat([latents, condition], dim=1).to(self.dtype)
            start = i * FRAMES
            return self.dit(channels, timestep, self.text_kv, modulation, self.cache, start, commit=commit)

        for n, step in enumerate(steps):
            self.flows.append(forward(x, step.timestep))
            self.x0s.append(predict_x0(x, self.flows[-1], step.sigma))
            if n + 1 < len(steps):
                noise = self.inputs["renoise"][i, n].transpose(1, 2).to(self.dtype)
                x = renoise(self.x0s[-1], noise, steps[n + 1].sigma)
        assert forward(self.x0s[-1], 0.0, commit=True) is None
        self.chunk += 1
        return self.x0s[-1]
