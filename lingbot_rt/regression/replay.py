"""A recorded session, run again: the same events at the same chunks, frame by frame against the recorded hashes."""

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
from lingbot_rt.regression.play import PlayedChunk, scripted_init


@dataclass(frozen=True, slots=True)
class ChunkVerdict:
    """One chunk of a replay against the record."""

    index: int
    frames: int
    different: int  # frames whose hash is not the recorded one
    psnr: float  # of the last frame, dB; infinite when it is equal

    def passes(self, min_psnr: float) -> bool:
        return self.different == 0 or self.psnr >= min_psnr


def replay_init(record: SessionRecord) -> dict[str, Any]:
    """The init that plays the recorded chunks again. Raises RecordError when there are none."""
    if not record.chunks:
        raise RecordError(f"{record.folder}: no chunk was finished, there is nothing to replay")
    events = [
        CaseEvent(chunk.index, event.kind, event.payload, event.event_id)
        for chunk in record.chunks
        for event in chunk.events
    ]
    init = record.session.init | {"first_frame": record.first_frame, "seed": record.session.seed}
    # The name the model had then does not matter; that it is the same model shows in the frames.
    init.pop("model", None)
    return scripted_init(init, events, len(record.chunks))


def compare_chunk(record: SessionRecord, recorded: ChunkLine, played: PlayedChunk) -> ChunkVerdict:
    """``played`` against the same chunk of the record; only its last frame is there to be measured."""
    hashes = [frame_hash(frame) for frame in played.frames]
    shared = sum(a == b for a, b in zip(recorded.hashes, hashes, strict=False))
    different = max(len(recorded.hashes), len(hashes)) - shared
    quality = math.inf
    if different:
        true, got = read_last_frame(record.folder, recorded.index), played.frames[-1]
        quality = psnr(got, true) if got.shape == true.shape else 0.0
    return ChunkVerdict(recorded.index, len(hashes), different, quality)


def side_by_side(record: SessionRecord, recorded: ChunkLine, played: PlayedChunk) -> Iterator[npt.NDArray[np.uint8]]:
    """Every replayed frame [H, W, 3] to the right of the recorded last frame of its chunk: [H, 2 W, 3]."""
    true = read_last_frame(record.folder, recorded.index)
    for frame in played.frames:
        yield np.concatenate([true, frame], axis=1)


def table(record: SessionRecord, verdicts: list[ChunkVerdict]) -> str:
    """One line a chunk and a last line for the whole."""
    lines = [f"{'chunk':>5} {'frames':>7} {'differ':>7} {'PSNR of the last':>17}"]
    for verdict in verdicts:
        quality = f"{verdict.psnr:.1f} dB" if verdict.different else "exact"
        lines.append(f"{verdict.index:>5} {verdict.frames:>7} {verdict.different:>7} {quality:>17}")
    frames = sum(verdict.frames for verdict in verdicts)
    different = sum(verdict.different for verdict in verdicts)
    lines.append(
        f"{record.session.session_id}: {frames - different} of {frames} frames bit for bit the recorded ones "
        f"({record.session.model} on {record.session.device}, {record.session.dtype})"
    )
    return "\n".join(lines)
