"""How far each faster setting takes a session from the exact one: errors of latents, and PSNR of frames.

Every variant plays the same session: weights, noise, first frame and keys are the same, and each chunk continues on the
variant's own latents. So the figures show whether errors grow.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lingbot_rt.bench.figures import number, table
from lingbot_rt.bench.pipeline import SyntheticSession, Workload
from lingbot_rt.bench.random_model import random_pipeline
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.frame_readback import to_uint8
from lingbot_rt.engine.memory import require_room
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.errors import one_line
from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.parallel.parallelize import FrameDecoder
from lingbot_rt.session.plan import ModelInfo, SessionPlan

log = logging.getLogger(__name__)

_VAE, _LINEARS, _WINDOW = {"vae_dtype": "bfloat16"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "bfloat16 VAE": _VAE,
    "fp8 linears": _LINEARS,
    "fp8 window": _WINDOW,
    "all": _VAE | _LINEARS | _WINDOW,
}
"""Options of ``serve`` beside those of the exact session. "exact" is run again: it shows what repeats."""

SESSIONS = 2 * (1 + len(VARIANTS))
"""Sessions that are played at most: of two models, the exact one and every variant."""


@dataclass(frozen=True, slots=True)
class Row:
    """One variant beside the exact session, chunk by chunk."""

    variant: str
    latent_error: list[float] = field(default_factory=list)  # relative RMS, of the model with random weights
    psnr_db: list[float | None] = field(default_factory=list)  # of the frames' model; None: frames are identical
    note: str = ""  # why there are no figures

    @property
    def growth(self) -> float | None:
        """The mean error of the last third of the chunks / that of the first third; None without an error."""
        third = max(len(self.latent_error) // 3, 1)
        first, last = self.latent_error[:third], self.latent_error[-third:]
        return float(np.mean(last) / np.mean(first)) if any(first) else None


@dataclass(slots=True)
class FidelityReport:
    model: str  # with random weights
    frames_model: str  # with its own weights
    device: str
    torch: str
    dtype: str
    size: str
    frames_size: str
    sink_frames: int
    window_frames: int
    steps: int
    chunks: int
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Played:
    """What a session of a variant gave, on the host, by chunk."""

    info: ModelInfo
    plan: SessionPlan
    latents: list[Tensor]  # float32 [1, z, F, h, w]
    frames: list[npt.NDArray[np.uint8]]  # [n, H, W, 3]; empty unless they are kept


class RecordingDecoder:
    """A FrameDecoder that keeps what it decodes and, with ``keep_frames``, what that becomes."""

    def __init__(self, decode: FrameDecoder, *, keep_frames: bool) -> None:
        self.share = decode.share
        self._decode = decode
        self._keep_frames = keep_frames
        self._latents: list[Tensor] = []
        self._frames: list[npt.NDArray[np.uint8]] = []

    def __call__(self, latent: Tensor, features: FeatureCache) -> Tensor | None:
        pixels = self._decode(latent, features)
        self._latents.append(latent.float().cpu())
        if self._keep_frames and pixels is not None:
            self._frames.append(to_uint8(pixels).cpu().numpy())
        return pixels

    def take_chunk(self) -> tuple[Tensor, npt.NDArray[np.uint8] | None]:
        """Latents and frames since the last call."""
        latents = torch.cat(self._latents, dim=2)
        frames = np.concatenate(self._frames) if self._frames else None
        self._latents, self._frames = [], []
        return latents, frames


def measure_fidelity(
    config: ServeConfig,
    workload: Workload,
    frames_config: ServeConfig,
    on_chunk: Callable[[], object],
    on_variant: Callable[[FidelityReport], None],
) -> None:
    """Plays ``workload.chunks`` chunks of every variant, one variant at a time: with random weights of ``config``'s
    model, then with ``frames_config``'s own model at its own size and window.

    Calls ``on_chunk`` after every chunk and ``on_variant`` with the report after every variant. Raises ConfigError,
    CheckpointError or CapacityError if the exact session cannot be played. Other variants' errors become notes.
    """
    frames_workload = Workload(chunks=workload.chunks)
    config, frames_config = (
        replace(each, quantization="none", vae_dtype="float32", kv_cache_dtype="auto")
        for each in (config, frames_config)
    )

    def latents_of(options: dict[str, Any]) -> Played:
        return _play(random_pipeline(replace(config, **options)), workload, on_chunk)

    def frames_of(options: dict[str, Any]) -> Played:
        pipeline = load_pipeline(replace(frames_config, **options), lambda status: None)
        return _play(pipeline, frames_workload, on_chunk, keep_frames=True)

    exact_latents = latents_of({})
    _free_memory()
    exact_frames = frames_of({})
    report = _report(config, exact_latents, frames_config, exact_frames)
    for variant, options in VARIANTS.items():
        _free_memory()
        try:
            latents = latents_of(options).latents
            _free_memory()
            frames = frames_of(options).frames
        except Exception as error:
            log.exception("%s", variant)
            report.rows.append(Row(variant, note=one_line(error)))
        else:
            errors = [relative_rms(*pair) for pair in zip(latents, exact_latents.latents, strict=True)]
            psnrs = [psnr_db(*pair) for pair in zip(frames, exact_frames.frames, strict=True)]
            report.rows.append(Row(variant, errors, psnrs))
        on_variant(report)


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, computed in float64."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def psnr_db(got: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> float | None:
    """Peak signal-to-noise ratio of 8-bit frames; None for identical ones."""
    error = float(np.mean((got.astype(np.float64) - expected) ** 2))
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def _play(
    pipeline: Pipeline, workload: Workload, on_chunk: Callable[[], object], *, keep_frames: bool = False
) -> Played:
    plan = workload.session_plan(pipeline)
    require_room(pipeline, plan)
    recorder = RecordingDecoder(pipeline.decode, keep_frames=keep_frames)
    session = SyntheticSession(replace(pipeline, decode=recorder), plan)
    played = Played(pipeline.model_info, plan, [], [])
    for _ in range(workload.chunks):
        session.step()
        latents, frames = recorder.take_chunk()
        played.latents.append(latents)
        if frames is not None:
            played.frames.append(frames)
        on_chunk()
    return played


def _report(config: ServeConfig, latents: Played, frames_config: ServeConfig, frames: Played) -> FidelityReport:
    return FidelityReport(
        model=config.model_path,
        frames_model=frames_config.model_path,
        device=latents.info.device,
        torch=torch.__version__,
        dtype=latents.info.dtype,
        size=str(latents.plan.size),
        frames_size=str(frames.plan.size),
        sink_frames=latents.plan.sink_frames,
        window_frames=latents.plan.window_frames,
        steps=latents.plan.num_steps,
        chunks=len(latents.latents),
    )


def _free_memory() -> None:
    """Frees the last pipeline: two of them do not fit on one device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_text(report: FidelityReport) -> str:
    rows = [
        [
            row.variant,
            _percent(row.latent_error, lambda errors: float(np.mean(errors))),
            _percent(row.latent_error, max),
            number(row.growth, 2),
            *_decibels(row),
            row.note,
        ]
        for row in report.rows
    ]
    return "\n".join(
        [
            f"{report.device}, torch {report.torch}, DiT {report.dtype}",
            f"{report.chunks} chunks, each variant on its own latents",
            f"latents: {report.model} (random weights), {report.size}, window {report.window_frames} (sink "
            f"{report.sink_frames}), {report.steps} steps; relative RMS",
            f"frames: {report.frames_model}, {report.frames_size}; PSNR in dB",
            "",
            table(("variant", "mean", "worst chunk", "last / first third", "PSNR", "worst chunk", ""), rows),
        ]
    )


def _percent(errors: list[float], of: Callable[[list[float]], float]) -> str:
    return f"{100 * of(errors):.3f} %" if errors else "-"


def _decibels(row: Row) -> tuple[str, str]:
    """PSNR of all frames together, and of the worst chunk."""
    if not row.psnr_db:
        return "-", "-"
    finite = [each for each in row.psnr_db if each is not None]
    if not finite:
        return "identical", "identical"
    squares = sum(10 ** (-each / 10) for each in finite) / len(row.psnr_db)
    return number(float(-10 * np.log10(squares))), number(min(finite))
