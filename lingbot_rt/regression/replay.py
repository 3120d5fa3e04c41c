"""Runs a recorded session again with the same events at the same chunks, and compares frame hashes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lingbot_rt.errors import RecordError
from lingbot_rt.recording.record_file import ChunkLine, SessionRecord, frame_hash, read_last_frame
from lingbot_rt.regression.cases import CaseEvent
from lingbot_rt.regression.metrics import psnr
from lingbot_rt.regression.session_runner import ChunkOutput, scripted_init


@dataclass(frozen=True, slots=True)
class ChunkVerdict:
    """The comparison of one replayed chunk with the record."""

    index: int
    frames: int
    different: int  # frames whose hash differs from the recorded one
    psnr: float  # of the last frame in dB; infinite if it is equal

    def passes(self, min_psnr: float) -> bool:
        return self.different == 0 or self.psnr >= min_psnr


def replay_init(record: SessionRecord) -> dict[str, Any]:
    """The init that runs the recorded chunks again. Raises RecordError if there are none."""
    if not record.chunks:
        raise RecordError(f"{record.folder}: the record has no finished chunk")
    events = [
        CaseEvent(chunk.index, event.kind, event.payload, event.event_id)
        for chunk in record.chunks
        for event in chunk.events
    ]
    init = record.session.init | {"first_frame": record.first_frame, "seed": record.session.seed}
    # A server refuses a model name other than its own, and the frames show whether the model is the same.
    init.pop("model", None)
    return scripted_init(init, events, len(record.chunks))


def compare_chunk(record: SessionRecord, recorded: ChunkLine, replayed: ChunkOutput) -> ChunkVerdict:
    """Compares all hashes, and the last frame's pixels: the record has no other frame's pixels."""
    hashes = [frame_hash(frame) for frame in replayed.frames]
    shared = sum(a == b for a, b in zip(recorded.hashes, hashes, strict=False))
    different = max(len(recorded.hashes), len(hashes)) - shared
    quality = math.inf
    if different:
        expected, got = read_last_frame(record.folder, recorded.index), replayed.frames[-1]
        quality = psnr(got, expected) if got.shape == expected.shape else 0.0
    return ChunkVerdict(recorded.index, len(hashes), different, quality)


def side_by_side(record: SessionRecord, recorded: ChunkLine, replayed: ChunkOutput) -> Iterator[npt.NDArray[np.uint8]]:
    """Every replayed frame [H, W, 3] to the right of the recorded last frame of its chunk: [H, 2 W, 3]."""
    last = read_last_frame(record.folder, recorded.index)
    for frame in replayed.frames:
        yield np.concatenate([last, frame], axis=1)


def table(record: SessionRecord, verdicts: list[ChunkVerdict]) -> str:
    """One line per chunk and a summary line."""
    lines = [f"{'chunk':>5} {'frames':>7} {'differ':>7} {'PSNR of the last':>17}"]
    for verdict in verdicts:
        quality = f"{verdict.psnr:.1f} dB" if verdict.different else "exact"
        lines.append(f"{verdict.index:>5} {verdict.frames:>7} {verdict.different:>7} {quality:>17}")
    frames = sum(verdict.frames for verdict in verdicts)
    different = sum(verdict.different for verdict in verdicts)
    lines.append(
        f"{record.session.session_id}: {frames - different} of {frames} frames bit for bit equal "
        f"({record.session.model} on {record.session.device}, {record.session.dtype})"
    )
    return "\n".join(lines)
