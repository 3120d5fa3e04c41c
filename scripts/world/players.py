"""Worlds that the evaluation walks in: a checkpoint folder through the serving code, and the truth itself."""

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
from lingbot_rt.session.controls import Actions
from lingbot_rt.session.plan import ChunkPlan, FrameGroup, SessionPlan
from scripts.world.render import Renderer
from scripts.world.walks import View, follow

Frames = npt.NDArray[np.uint8]
"""[n, H, W, 3]: 9 pictures of a session's first chunk, then 12."""

FRAMES_OF_CHUNK = 3

BREAKS = ("cache", "sink", "rays", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    look: int


@dataclass(frozen=True, slots=True)
class Start:
    """Where and how a session begins."""

    view: View
    prompt: Prompt
    seed: int


class Session(Protocol):
    def step(self, actions: Actions, prompt: Prompt) -> Frames:
        """The next chunk."""

    def fork(self) -> Session:
        """A session that goes on from here by itself."""


class World(Protocol):
    def start(self, start: Start) -> Session: ...


class ServedWorld:
    """A checkpoint folder, loaded and run by the serving code: what a client sees, less the socket.

    ``broken`` names one of BREAKS, to show that the evaluation notices: the window forgets every chunk (cache) or the
    first one (sink), the camera stands still (rays), or the first prompt stays (text).
    """

    def __init__(self, folder: Path, device: str, renderer: Renderer, broken: str | None = None) -> None:
        config = ServeConfig(model_path=str(folder), device=device, dtype="float32")
        self.pipeline = load_pipeline(config, lambda status: None)
        self.renderer, self.broken = renderer, broken

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

    def step(self, actions: Actions, prompt: Prompt) -> Frames:
        relative = self._path.extend(actions)
        text = prompt.text
        if self._world.broken == "rays":
            relative = np.broadcast_to(np.eye(4), relative.shape)
        if self._world.broken == "text":
            text = self._state.plan.prompt
        groups: list[Frames] = []

        def keep(group: FrameGroup) -> None:
            groups.append(group.pixels.copy())

        run_chunk(self._world.pipeline, self._state, ChunkPlan("evaluation", self._chunk, text, relative, None), keep)
        self._chunk += 1
        if self._world.broken in ("cache", "sink"):
            self._forget()
        return np.concatenate(groups)

    def fork(self) -> ServedSession:
        twin = copy.copy(self)
        twin._path = copy.deepcopy(self._path)
        twin._state = copy.copy(self._state)
        with torch.inference_mode():
            twin._state.cache = copy.deepcopy(self._state.cache)
            twin._state.features = copy.deepcopy(self._state.features)
        return twin

    def _forget(self) -> None:
        cache = self._state.cache
        with torch.inference_mode():
            for layer in range(len(self._world.pipeline.dit.blocks)):
                for side in cache.view(layer):
                    sink = side.shape[1] // cache.visible_frames * cache.sink_frames
                    (side if self._world.broken == "cache" else side[:, :sink]).zero_()


class TrueWorld:
    """The rendering itself. ``blunder`` may change the keys, the prompt or the pictures, to see what a measure says."""

    def __init__(
        self, renderer: Renderer, blunder: Callable[[Actions, Prompt], tuple[Actions, Prompt]] | None = None
    ) -> None:
        self.renderer, self.blunder = renderer, blunder

    def start(self, start: Start) -> TrueSession:
        return TrueSession(self, start)


class TrueSession:
    def __init__(self, world: TrueWorld, start: Start) -> None:
        self._world, self._start = world, start
        self._path = CameraPath()
        self._poses: list[npt.NDArray[np.float64]] = []

    def step(self, actions: Actions, prompt: Prompt) -> Frames:
        if self._world.blunder is not None:
            actions, prompt = self._world.blunder(actions, prompt)
        first = 4 * (len(self._poses) - 1) + 1 if self._poses else 0
        for keys in actions:
            self._path.extend((keys,))
            self._poses.append(self._path.pose)
        poses = follow(self._start.view, np.stack(self._poses)).between().poses()[first:]
        return self._world.renderer.render(poses, [prompt.look] * len(poses)).cpu().numpy()

    def fork(self) -> TrueSession:
        twin: Any = copy.copy(self)
        twin._path, twin._poses = copy.deepcopy(self._path), list(self._poses)
        return twin
