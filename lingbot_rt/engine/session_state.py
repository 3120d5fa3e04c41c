"""What a session keeps on the device between its chunks."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lingbot_rt.engine.flow_match import CLEAN
from lingbot_rt.engine.history import History, KeptChunk, WholeState
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.recache import Recache
from lingbot_rt.errors import ChunkCancelled
from lingbot_rt.models.dit import CameraModulation, TextKV, TimeModulation, copy_pairs
from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.i2v_condition import preprocess_image
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.models.transfer import to_device
from lingbot_rt.session.camera_path import Pose
from lingbot_rt.session.plan import ChunkPlan, SessionPlan

_HOST = torch.device("cpu")

_SAME_POSE = 1e-9
"""Poses that differ by less come from the same keys; the ray maps' float32 does not tell them apart."""


@dataclass(frozen=True, slots=True)
class NegativeBranch:
    """The second forward of guidance: the negative prompt's text K/V and a window of its own."""

    text_kv: TextKV
    cache: KVCache


class SessionState:
    """KV window, text K/V, image condition, VAE features and noise generator of one session.

    Built and used on the engine thread; only ``cancel`` may be called from another.
    """

    def __init__(self, pipeline: Pipeline, plan: SessionPlan) -> None:
        self.plan = plan
        self.dtype = pipeline.dtype
        self._pipeline = pipeline
        self._cancelled = threading.Event()
        self._prompt: str | None = None
        self._text_kv: TextKV = []
        self._poses: Pose | None = None
        self._lenses: Pose | None = None
        self._camera: CameraModulation | None = None
        self._camera_is_of_poses = False
        self._noise_device = pipeline.noise_device
        self._generator = torch.Generator(self._noise_device).manual_seed(plan.seed)
        self.cache = new_cache(pipeline, plan, pipeline.device)
        latent_frames = plan.latent_frames
        self.history = History(
            latent_frames=latent_frames,
            sink_frames=plan.sink_frames,
            window_frames=plan.window_frames,
            limit_bytes=pipeline.history_bytes,
        )
        cache = self.cache  # not by way of `self`: a cycle would keep a closed session until the next collection
        self._holds = lambda index: cache.holds(index * latent_frames, latent_frames)
        self.recache = Recache(-(-plan.sink_frames // latent_frames), self._holds)
        self.negative: NegativeBranch | None = None
        if plan.guidance_scale > 1:
            self.negative = NegativeBranch(
                pipeline.text_kv(plan.negative_prompt), new_cache(pipeline, plan, pipeline.device)
            )
        timesteps = [step.timestep for step in pipeline.schedule.steps_for(plan.num_steps)]
        self.time_modulation: dict[float, TimeModulation] = {
            timestep: pipeline.dit.time_modulation(timestep) for timestep in (*timesteps, CLEAN)
        }
        image = preprocess_image(plan.first_frame).to(pipeline.device)
        decoding = pipeline.decoding(plan)
        with decoding.placement.on_device():
            self._condition_first, self._condition_later = decoding.vae.encode_condition(image, plan.latent_frames)
        self.features: FeatureCache = decoding.vae.new_features()
        self.text_kv(plan.prompt)
        self.postprocessor = pipeline.open_postprocessor(plan)

    def text_kv(self, prompt: str) -> TextKV:
        """Cross-attention K/V of ``prompt``; computed when it differs from the last one, the world's K/V are kept."""
        if prompt != self._prompt:
            new = self._pipeline.text_kv(prompt)
            # In one place for the whole session: captured forwards read them there.
            self._text_kv = copy_pairs(new, self._text_kv) if self._text_kv else new
            self._prompt = prompt
            self.recache.stop()
        return self._text_kv

    @property
    def windows(self) -> tuple[KVCache, ...]:
        """The attention window, and that of the negative prompt with guidance."""
        return (self.cache,) if self.negative is None else (self.cache, self.negative.cache)

    @property
    def random_state(self) -> Tensor:
        """Of the noise generator. uint8 on the host."""
        return self._generator.get_state()

    def set_random_state(self, state: Tensor | None) -> bool:
        """``random_state`` of another time; None is that of the beginning. Whether this device takes it."""
        if state is None:
            self._generator.manual_seed(self.plan.seed)
            return True
        if state.shape != self._generator.get_state().shape:  # of another device's generator
            return False
        self._generator.set_state(state)
        return True

    def keep(self, plan: ChunkPlan, latents: Tensor, again: KeptChunk | None) -> None:
        """Puts the chunk that is finished into the history. ``latents``: on the host, the history's own from now on.

        ``again``: the older chunk that was computed with it.
        """
        recached, newest = None if again is None else again.index, self.history.newest
        prompts = {} if newest is None else {index: old for index, old in newest.prompts.items() if self._holds(index)}
        if recached is not None:
            prompts[recached] = plan.prompt
        self.history.add(
            KeptChunk(
                index=plan.chunk_index,
                latents=latents,
                prompt=plan.prompt,
                relative_poses=self._poses,
                lenses=self._lenses,
                recent_frames=plan.recent_frames,
                recached=recached,
                prompts=prompts,
                pending=self.recache.pending,
                random_state=self.random_state,
                whole=self._whole_state(plan.chunk_index, recached) if self._pipeline.keeps_kv else None,
            )
        )

    def _whole_state(self, chunk_index: int, recached: int | None) -> WholeState:
        last, newest = self.postprocessor.last_frame, self.history.newest
        new_again = {} if recached is None else self._kv_of(recached)
        again = {} if newest is None or newest.whole is None else newest.whole.again
        return WholeState(
            frame_of_slot=self.cache.frame_of_slot,
            kv=self._kv_of(chunk_index),
            again={frame: kv for frame, kv in again.items() if self.cache.holds(frame, 1)} | new_again,
            new_again=tuple(new_again),
            features=[slot.to(_HOST) if isinstance(slot, Tensor) else slot for slot in self.features.slots],
            last_frame=None if last is None else last.to(_HOST),
        )

    def _kv_of(self, chunk_index: int) -> dict[int, tuple[Tensor, ...]]:
        """What the windows hold of a chunk, by latent frame."""
        first = chunk_index * self.plan.latent_frames
        held = [frame for frame in range(first, first + self.plan.latent_frames) if self.cache.holds(frame, 1)]
        return {frame: tuple(window.read(frame) for window in self.windows) for frame in held}

    def holds_camera_of(self, chunk: KeptChunk | None) -> None:
        """The next chunk takes this one's camera modulation if its poses are the same, as when it followed it."""
        self._camera_is_of_poses = False
        self._poses, self._lenses = (None, None) if chunk is None else (chunk.relative_poses, chunk.lenses)

    @property
    def nbytes(self) -> int:
        """What stays of the session between its chunks, but for text and condition."""
        return sum(window.nbytes for window in self.windows) + self.features.nbytes + self.history.nbytes

    @property
    def missing_host_bytes(self) -> int:
        """Host memory that is still to be taken before ``move`` can take the session off its GPU."""
        return sum(window.missing_host_bytes for window in self.windows) + self.features.missing_host_bytes

    def move(self, device: torch.device) -> None:
        """Moves what is large to ``device``: windows and VAE features. What is soon computed again is dropped."""
        for window in self.windows:
            window.move(device)
        self.features.move(device)
        self._camera, self._camera_is_of_poses = None, False
        if self._pipeline.device.type == "cuda":
            torch.cuda.synchronize(self._pipeline.device)

    def camera(self, relative_poses: Pose | None, lenses: Pose | None = None) -> CameraModulation | None:
        """Camera modulation of a chunk; that of the chunk before while the same keys are held. ``lenses``: [F, 4]."""
        is_same = (
            relative_poses is not None
            and self._poses is not None
            and np.allclose(relative_poses, self._poses, 0, _SAME_POSE)
            and np.array_equal(lenses, self._lenses)  # type: ignore[arg-type]  # None equals None alone
        )
        if is_same:
            relative_poses = self._poses
        if not (is_same and self._camera_is_of_poses):
            self._camera_is_of_poses, self._poses, self._lenses = False, None, None
            if relative_poses is not None:
                rays = ray_map(relative_poses, self.plan.size, self._pipeline.device, lenses)
                # In one place while the session is on its device: captured forwards read it there. 3.8 GB for the 14B.
                self._camera = self._pipeline.dit.camera_modulation(rays.to(self.dtype), self._camera)
                self._camera_is_of_poses = True
            self._poses, self._lenses = relative_poses, lenses
        return self._camera if self._camera_is_of_poses else None

    def condition(self, chunk_index: int) -> Tensor:
        """The i2v condition [1, 4 + z, F, h, w]: the first frame in chunk 0, blank ones after."""
        return self._condition_first if chunk_index == 0 else self._condition_later

    def limit_window(self, recent_frames: int | None) -> None:
        """The next forwards see only the ``recent_frames`` latent frames before their chunk, the sink and the chunk."""
        visible = None if recent_frames is None else recent_frames + self.plan.latent_frames
        for cache in self.windows:
            cache.limit(visible)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise, float32, of the session's one generator."""
        noise = torch.randn(shape, generator=self._generator, device=self._noise_device)
        return to_device(noise, self._pipeline.device)

    def cancel(self) -> None:
        """The chunk in work stops before its next forward or decode. Thread-safe."""
        self._cancelled.set()

    def release(self) -> None:
        """Frees the session's tensors at once, whoever still holds a reference. No chunk may run afterwards."""
        self.cache.release()
        if self.negative is not None:
            self.negative.cache.release()
            self.negative = None
        self.features.release()
        self.history.clear()
        self.recache.stop()
        self.time_modulation.clear()
        self._text_kv = []
        self._camera = self._poses = None
        self._camera_is_of_poses = False
        del self._condition_first, self._condition_later, self.postprocessor

    @property
    def is_cancelled(self) -> bool:
        """On rank 0, where sessions are cancelled."""
        return self._cancelled.is_set()

    def raise_if_cancelled(self) -> None:
        """All ranks come here at the same places of a chunk and go the same way. It counts as progress."""
        self._pipeline.ranks.tick()
        if self._pipeline.ranks.agree(self.is_cancelled):
            raise ChunkCancelled(f"session {self.plan.session_id} was closed")


def new_cache(pipeline: Pipeline, plan: SessionPlan, device: torch.device) -> KVCache:
    """An empty window for this rank."""
    config = pipeline.dit.config
    return KVCache(
        num_layers=config.num_layers,
        num_heads=pipeline.own_heads,
        head_dim=config.attention_head_dim,
        tokens_per_frame=plan.size.tokens_per_frame,
        sink_frames=plan.sink_frames,
        window_frames=plan.window_frames,
        dtype=pipeline.kv_cache_dtype,
        device=device,
        recent_frames=[recent + plan.latent_frames for recent in plan.recent_frames],
    )
