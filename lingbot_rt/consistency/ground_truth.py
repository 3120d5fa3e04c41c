"""What is kept of a played case: hashes of all frames, key frames as PNG, the usual latency."""

from __future__ import annotations

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt import __version__
from lingbot_rt.consistency.cases import Case
from lingbot_rt.errors import ConfigError
from lingbot_rt.recording.record_file import frame_hash

GUARDED = ("chunk_total_ms", "dit_ms", "ws_payload_bytes")
"""The figures of chunk_stats that are kept and guarded."""


@dataclass(slots=True)
class PlayedChunk:
    frames: npt.NDArray[np.uint8]  # [n, H, W, 3]
    stats: dict[str, Any]  # the chunk's chunk_stats
    event_id: int | None = None


@dataclass(slots=True)
class PlayedCase:
    chunks: list[PlayedChunk] = field(default_factory=list)
    model: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure's median and 95th percentile over the chunks after the warm ones."""

    p50: float
    p95: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])


@dataclass(frozen=True, slots=True)
class Truth:
    """The ground truth of one case, as its truth.json says."""

    chunks: int
    hashes: list[list[str]]  # of every frame, a list a chunk
    figures: dict[str, Spread]
    model: str
    device: str
    made_with: dict[str, str]


def key_indices(count: int) -> list[int]:
    """First, middle and last of ``count`` frames."""
    return sorted({0, count // 2, count - 1})


def figures(case: Case, played: PlayedCase) -> dict[str, Spread]:
    """The guarded figures after the warm chunks (of all chunks when there are no more)."""
    chunks = played.chunks[case.warm_chunks :] or played.chunks
    return {
        name: Spread.of([float(chunk.stats[name]) for chunk in chunks])
        for name in GUARDED
        if all(name in chunk.stats for chunk in chunks)
    }


def write_truth(folder: Path, case: Case, played: PlayedCase) -> None:
    """Keeps ``played`` as the truth of ``case`` in ``folder``/NAME."""
    target = folder / case.name
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob("*.png"):
        stale.unlink()
    for number, chunk in enumerate(played.chunks):
        if number % case.keep_every == 0:
            for index in key_indices(len(chunk.frames)):
                Image.fromarray(chunk.frames[index]).save(key_path(target, number, index))
    truth = Truth(
        chunks=len(played.chunks),
        hashes=[[frame_hash(frame) for frame in chunk.frames] for chunk in played.chunks],
        figures=figures(case, played),
        model=played.model,
        device=played.device,
        made_with={"lingbot_rt": __version__, "python": platform.python_version(), "machine": platform.machine()},
    )
    (target / "truth.json").write_text(json.dumps(asdict(truth), indent=1) + "\n", encoding="utf-8")


def read_truth(folder: Path, case: Case) -> Truth:
    """Raises ConfigError when ``folder`` has no truth of ``case``."""
    path = folder / case.name / "truth.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["figures"] = {name: Spread(**spread) for name, spread in values["figures"].items()}
        return Truth(**values)
    except OSError:
        raise ConfigError(f"{path} is not there: make it with `lingbot-rt check record`", field="gt") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: {error}", field="gt") from None


def read_key_frame(folder: Path, case: Case, chunk: int, index: int) -> npt.NDArray[np.uint8]:
    with Image.open(key_path(folder / case.name, chunk, index)) as picture:
        return np.asarray(picture.convert("RGB"))


def key_path(folder: Path, chunk: int, index: int) -> Path:
    return folder / f"chunk{chunk:04d}_frame{index:02d}.png"
