"""A recorded session, run again: the same events at the same chunks, frame by frame against the recorded hashes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.consistency.cases import CaseEvent
from lingbot_rt.consistency.ground_truth import PlayedCase
from lingbot_rt.consistency.metrics import psnr
from lingbot_rt.consistency.play import scripted_init
from lingbot_rt.recording.record_file import SessionRecord, frame_hash, key_frame_path


@dataclass(frozen=True, slots=True)
class ChunkVerdict:
    """One chunk of a replay against the record."""

    index: int
    frames: int
    different: int  # frames whose hash is not the recorded one
    psnr: float  # of the last frame, dB; infinite when equal

    def passes(self, min_psnr: float) -> bool:
        return self.different == 0 or self.psnr >= min_psnr


def replay_init(record: SessionRecord) -> dict[str, Any]:
    """The init that plays the recorded chunks again."""
    events = [
        CaseEvent(chunk.index, event.kind, event.payload, event.event_id)
        for chunk in record.chunks
        for event in chunk.events
    ]
    init = record.session.init | {"first_frame": record.first_frame, "seed": record.session.seed}
    # The name the model had then does not matter; that it is the same model shows in the frames.
    init.pop("model", None)
    return scripted_init(init, events, max(len(record.chunks), 1))


def compare_with_record(record: SessionRecord, played: PlayedCase) -> list[ChunkVerdict]:
    """A verdict for each recorded chunk."""
    verdicts = []
    for chunk, again in zip(record.chunks, played.chunks, strict=True):
        hashes = [frame_hash(frame) for frame in again.frames]
        shared = sum(a == b for a, b in zip(chunk.hashes, hashes, strict=False))
        different = max(len(chunk.hashes), len(hashes)) - shared
        quality = math.inf if different == 0 else _psnr_of_last(record, chunk.index, again.frames[-1])
        verdicts.append(ChunkVerdict(chunk.index, len(hashes), different, quality))
    return verdicts


def _psnr_of_last(record: SessionRecord, index: int, frame: npt.NDArray[np.uint8]) -> float:
    recorded = recorded_last_frame(record, index)
    return psnr(frame, recorded) if recorded.shape == frame.shape else 0.0


def recorded_last_frame(record: SessionRecord, index: int) -> npt.NDArray[np.uint8]:
    with Image.open(key_frame_path(record.folder, index)) as picture:
        return np.asarray(picture.convert("RGB"))


def side_by_side(record: SessionRecord, played: PlayedCase) -> Iterator[npt.NDArray[np.uint8]]:
    """Every replayed frame [H, W, 3] to the right of the recorded last frame of its chunk: [H, 2 W, 3]."""
    for chunk, again in zip(record.chunks, played.chunks, strict=True):
        recorded = recorded_last_frame(record, chunk.index)
        for frame in again.frames:
            yield np.concatenate([recorded, frame], axis=1)


def table(record: SessionRecord, verdicts: list[ChunkVerdict]) -> str:
    """One line a chunk and a last line for the whole."""
    lines = [f"{'chunk':>5} {'frames':>7} {'differ':>7} {'PSNR of the last':>17}"]
    for verdict in verdicts:
        quality = "exact" if math.isinf(verdict.psnr) else f"{verdict.psnr:.1f} dB"
        lines.append(f"{verdict.index:>5} {verdict.frames:>7} {verdict.different:>7} {quality:>17}")
    frames = sum(verdict.frames for verdict in verdicts)
    different = sum(verdict.different for verdict in verdicts)
    lines.append(
        f"{record.session.session_id}: {frames - different} of {frames} frames bit for bit the recorded ones "
        f"({record.session.model} on {record.session.device}, {record.session.dtype})"
    )
    return "\n".join(lines)
