"""The two kinds of world that the evaluation compares: a checkpoint run by the serving code, and the ground truth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.pipeline import load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.controls import NEUTRAL, Actions
from lingbot_rt.session.plan import ChunkPlan, FrameGroup, SessionPlan
from scripts.world.config import CHUNK_FRAMES
from scripts.world.render import Renderer
from scripts.world.trajectories import View, place_in_world

Frames = npt.NDArray[np.uint8]
"""[n, H, W, 3]: 9 frames in a session's first chunk, then 12 per chunk."""

ABLATIONS = ("cache", "sink", "rays", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    look: int


@dataclass(frozen=True, slots=True)
class Start:
    """The view, prompt and seed that a session begins with."""

    view: View
    prompt: Prompt
    seed: int


class Session(Protocol):
    def step(self, actions: Actions | None, prompt: Prompt) -> Frames:
        """The frames of the next chunk. None: without camera control, as in a session that never sets a camera."""

    def fork(self) -> Session:
        """A copy that continues from here independently."""


class World(Protocol):
    def start(self, start: Start) -> Session: ...


class ServedWorld:
    """A checkpoint folder, loaded and run by the serving code in this process.

    ``ablation``, one of ABLATIONS, disables a part to show that the evaluation notices. cache zeroes the K/V of all
    past chunks, sink those of the first chunk, rays keeps the camera still, text keeps the first prompt.
    """

    def __init__(self, folder: Path, device: str, renderer: Renderer, ablation: str | None = None) -> None:
        config = ServeConfig(model_path=str(folder), device=device, dtype="float32", vae_dtype="float32")
        self.pipeline = load_pipeline(config, lambda status: None)
        self.folder, self.renderer, self.ablation = folder, renderer, ablation

    def start(self, start: Start) -> ServedSession:
        model_info = self.pipeline.model_info
        plan = SessionPlan(
            session_id="evaluation",
            prompt=start.prompt.text,
            first_frame=self.renderer.render(start.view.poses(), [start.prompt.look])[0].cpu().numpy(),
            size=model_info.default_size,
            latent_frames=model_info.latent_frames,
            seed=start.seed,
            num_steps=model_info.num_steps,
            guidance_scale=1.0,
            negative_prompt="",
            sink_frames=model_info.sink_frames,
            window_frames=model_info.window_frames,
        )
        with torch.inference_mode():
            return ServedSession(self, SessionState(self.pipeline, plan))


class ServedSession:
    def __init__(self, world: ServedWorld, state: SessionState) -> None:
        self._world, self._state = world, state
        self._path = CameraPath()
        self._chunk = 0

    def step(self, actions: Actions | None, prompt: Prompt) -> Frames:
        relative = None if actions is None else self._path.extend(actions)
        text = prompt.text
        if self._world.ablation == "rays" and relative is not None:
            relative = np.broadcast_to(np.eye(4), relative.shape)
        if self._world.ablation == "text":
            text = self._state.plan.prompt
        groups: list[Frames] = []

        def emit(group: FrameGroup) -> None:
            groups.append(group.pixels.copy())

        run_chunk(self._world.pipeline, self._state, ChunkPlan("evaluation", self._chunk, text, relative, None), emit)
        self._chunk += 1
        if self._world.ablation in ("cache", "sink"):
            self._zero_cache()
        return np.concatenate(groups)

    def fork(self) -> ServedSession:
        fork = copy.copy(self)
        fork._path = copy.deepcopy(self._path)
        fork._state = copy.copy(self._state)
        with torch.inference_mode():
            fork._state.cache = copy.deepcopy(self._state.cache)
            fork._state.features = copy.deepcopy(self._state.features)
            fork._state.history = copy.deepcopy(self._state.history)
        return fork

    def _zero_cache(self) -> None:
        cache = self._state.cache
        with torch.inference_mode():
            for layer in range(len(self._world.pipeline.dit.blocks)):
                for side in cache.view(layer):
                    sink = side.shape[1] // cache.visible_frames * cache.sink_frames
                    (side if self._world.ablation == "cache" else side[:, :sink]).zero_()


class GroundTruthWorld:
    """The renderer as a world. Without camera control it stands still.

    ``corrupt`` may change keys and prompt, to test what a metric says of a wrong world.
    """

    def __init__(
        self, renderer: Renderer, corrupt: Callable[[Actions, Prompt], tuple[Actions, Prompt]] | None = None
    ) -> None:
        self.renderer, self.corrupt = renderer, corrupt

    def start(self, start: Start) -> GroundTruthSession:
        return GroundTruthSession(self, start)


class GroundTruthSession:
    def __init__(self, world: GroundTruthWorld, start: Start) -> None:
        self._world, self._start = world, start
        self._path = CameraPath()
        self._poses: list[npt.NDArray[np.float64]] = []

    def step(self, actions: Actions | None, prompt: Prompt) -> Frames:
        if actions is None:
            actions = (NEUTRAL,) * CHUNK_FRAMES
        if self._world.corrupt is not None:
            actions, prompt = self._world.corrupt(actions, prompt)
        first = 4 * (len(self._poses) - 1) + 1 if self._poses else 0
        for keys in actions:
            self._path.extend((keys,))
            self._poses.append(self._path.pose)
        poses = place_in_world(self._start.view, np.stack(self._poses)).pixel_frames().poses()[first:]
        return self._world.renderer.render(poses, [prompt.look] * len(poses)).cpu().numpy()

    def fork(self) -> GroundTruthSession:
        fork: Any = copy.copy(self)
        fork._path, fork._poses = copy.deepcopy(self._path), list(self._poses)
        return fork
