"""Ground truth of a case on disk: hashes of all frames, key frames as PNG, times and sizes."""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt import __version__
from lingbot_rt.errors import ConfigError
from lingbot_rt.recording.record_file import frame_hash
from lingbot_rt.regression.cases import Case
from lingbot_rt.regression.session_runner import ChunkOutput, Origin


class GroundTruth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a case's truth.json."""

    hashes: list[list[str]]  # of every frame, one list per chunk
    event_ids: list[int | None]  # of each chunk
    figures: dict[str, float]  # see ``Figures``
    origin: Origin
    made_with: dict[str, str]


class Figures:
    """Times and sizes of a case's chunks after the first ones, under the names that existing clients use.

    ``p50_chunk_total_ms``, ``p95_chunk_total_ms``, the same for ``dit_ms``, and for ``ws_payload_mb`` (MiB) if the
    statistics have it.
    """

    def __init__(self, ignore_initial_chunks: int) -> None:
        self._ignore = ignore_initial_chunks
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, stats: Mapping[str, Any]) -> None:
        if self._ignore > 0:
            self._ignore -= 1
            return
        for name in ("chunk_total_ms", "dit_ms"):
            self._values[name].append(float(stats[name]))
        if "ws_payload_bytes" in stats:
            self._values["ws_payload_mb"].append(stats["ws_payload_bytes"] / 2**20)

    def summary(self) -> dict[str, float]:
        figures = {}
        for name, values in self._values.items():
            figures[f"p50_{name}"] = statistics.median(values)
            figures[f"p95_{name}"] = sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]
        return figures


class GroundTruthWriter:
    """Writes a case to ``folder``/NAME chunk by chunk. ``finish`` writes truth.json, which makes it complete."""

    def __init__(self, folder: Path, case: Case) -> None:
        self._case = case
        self._folder = folder / case.name
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in (*self._folder.glob("*.png"), *self._folder.glob("truth.json")):
            stale.unlink()
        self._hashes: list[list[str]] = []
        self._event_ids: list[int | None] = []
        self._figures = Figures(case.ignore_initial_chunks)

    def add(self, chunk: ChunkOutput) -> None:
        number = len(self._hashes)
        for index in key_indices(self._case, number, len(chunk.frames)):
            Image.fromarray(chunk.frames[index]).save(key_path(self._folder, number, index))
        self._hashes.append([frame_hash(frame) for frame in chunk.frames])
        self._event_ids.append(chunk.event_id)
        self._figures.add(chunk.stats)

    def finish(self, origin: Origin) -> None:
        made_with = {"lingbot_rt": __version__, "torch": version("torch"), "python": platform.python_version()}
        truth = GroundTruth(self._hashes, self._event_ids, self._figures.summary(), origin, made_with)
        (self._folder / "truth.json").write_bytes(msgspec.json.format(msgspec.json.encode(truth), indent=1) + b"\n")


def read_ground_truth(folder: Path, case: Case) -> GroundTruth:
    """Raises ConfigError if ``folder`` has no ground truth of ``case``."""
    path = folder / case.name / "truth.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=GroundTruth)
    except OSError:
        raise ConfigError(f"{path} is missing: make it with `lingbot-rt check record`", field="gt") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error}", field="gt") from None


def key_indices(case: Case, chunk: int, num_frames: int) -> list[int]:
    """Indices of a chunk's key frames: first, middle and last of every k-th chunk."""
    return [] if chunk % case.keep_every else sorted({0, num_frames // 2, num_frames - 1})


def read_key_frame(folder: Path, case: Case, chunk: int, index: int) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]. Raises ConfigError if it is missing, because the case file has changed since."""
    path = key_path(folder / case.name, chunk, index)
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ConfigError(f"{path}: {error}; make it again with `lingbot-rt check record`", field="gt") from None


def key_path(folder: Path, chunk: int, index: int) -> Path:
    return folder / f"chunk{chunk:04d}_frame{index:02d}.png"
