"""Writes a session's record on a thread of its own, so that no chunk waits for the disk or for hashing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import platform
import queue
import shutil
import threading
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt import __version__
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import one_line
from lingbot_rt.recording.record_file import (
    FORMAT,
    RECORD_NAME,
    ChunkLine,
    EndLine,
    RecordedEvent,
    RecordLine,
    SessionLine,
    encode_last_frame,
    encode_line,
    frame_hash,
    keepable,
    last_frame_path,
)
from lingbot_rt.session.messages import Init
from lingbot_rt.session.plan import ModelInfo, SessionPlan

log = logging.getLogger(__name__)

_VERSIONS = {
    "lingbot_rt": __version__,
    "python": platform.python_version(),
    **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
}
_WAITING_CHUNKS = 4
_CLOSE_LIMIT_S = 10.0

Frames = list[npt.NDArray[np.uint8]]


def start_record(config: ServeConfig, init: Init, plan: SessionPlan, info: ModelInfo) -> SessionRecorder | None:
    """Starts the record of a session under ``config.record_dir``.

    Saves the first frame after decoding and resizing, so that a replay needs neither. If the folder can't be written,
    logs an error and returns None; the session goes on without a record.
    """
    fields = {name: getattr(init, name) for name in init.__struct_fields__ if name not in ("first_frame", "record")}
    given = {name: value for name, value in fields.items() if value is not None}
    given["interactive_kv_window"] = bool(plan.recent_frames)  # which may be the server's own setting
    picture = io.BytesIO()
    Image.fromarray(plan.first_frame).save(picture, "PNG")
    root, max_bytes = Path(str(config.record_dir)), config.record_max_mb * 2**20
    try:
        make_room(root, config.record_total_mb * 2**20 - max_bytes)
        return SessionRecorder(root, plan.session_id, given, picture.getvalue(), info, max_bytes)
    except OSError as error:
        log.error("session %s is not recorded: --record-dir %s: %s", plan.session_id, root, error)
        return None


def make_room(root: Path, max_bytes: int) -> None:
    """Deletes the oldest records under ``root`` until the rest takes at most ``max_bytes``."""
    records = sorted(path.parent for path in root.glob(f"*/{RECORD_NAME}"))  # names begin with the time
    sizes = [sum(file.stat().st_size for file in record.iterdir()) for record in records]
    total = sum(sizes)
    for record, size in zip(records, sizes, strict=True):
        if total <= max_bytes:
            return
        log.info("record %s deleted: --record-total-mb is reached", record)
        shutil.rmtree(record)
        total -= size


class SessionRecorder:
    """One session's record. ``chunk`` queues a finished chunk and returns at once.

    If the disk is too slow or full, or the size limit is reached, the record ends with a warning and the session goes
    on.
    """

    def __init__(
        self,
        root: Path,
        session_id: str,
        init: dict[str, Any],
        first_frame: bytes,
        info: ModelInfo,
        max_bytes: int,
    ) -> None:
        """Makes the folder and writes the first line. ``init`` is the client's init without its first frame.

        What JSON cannot hold of it is named in that line and in the log. Raises OSError, and leaves no folder, if
        ``root`` can't be written.
        """
        self._bytes_left = max_bytes
        self._end_reason: str | None = None  # set once the record takes no more chunks
        started = datetime.now(UTC)
        self.folder = root / f"{started:%Y%m%dT%H%M%S}-{session_id}"
        left_out: list[str] = []
        kept = keepable(init, "", left_out)
        if left_out:
            log.warning("record %s: the init is kept without %s", self.folder, left_out[:4])
        picture = f"first_frame-{hashlib.sha256(first_frame).hexdigest()[:16]}.png"
        line = SessionLine(
            format=FORMAT,
            session_id=session_id,
            started_at=started.isoformat(timespec="milliseconds"),
            init=kept,
            first_frame=picture,
            seed=init["seed"],
            model=info.model_id,
            model_path=info.model_path,
            device=info.device,
            dtype=info.dtype,
            versions=_VERSIONS,
            left_out=left_out,
        )
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._file = undo.enter_context(_new_file(self.folder / RECORD_NAME))
            self._write(line)
            self._save(self.folder / picture, first_frame)
            undo.pop_all()
        self._queue: queue.Queue[tuple[ChunkLine, Frames] | EndLine] = queue.Queue(_WAITING_CHUNKS)
        self._thread = threading.Thread(target=self._run, name=f"record-{session_id}", daemon=True)
        self._thread.start()

    def chunk(
        self, index: int, events: list[RecordedEvent], event_id: int | None, frames: Frames, stats: dict[str, Any]
    ) -> None:
        """Queues a finished chunk. ``frames``: its raw frames as sent, [n, H, W, 3] groups in order."""
        if not self.is_recording:
            return
        try:
            self._queue.put_nowait((ChunkLine(index, events, event_id, [], stats), frames))
        except queue.Full:
            self._end("the disk is too slow")

    @property
    def is_recording(self) -> bool:
        """Whether the record still takes chunks."""
        return self._end_reason is None

    @property
    def waiting(self) -> int:
        """Chunks queued and not on disk yet."""
        return self._queue.unfinished_tasks

    def close(self, reason: str) -> None:
        """Writes the last line and waits at most 10 s each for the queue and the thread."""
        self._end_reason = self._end_reason or reason
        with contextlib.suppress(queue.Full):  # the writer hangs on its disk: give up on the last line
            self._queue.put(EndLine(self._end_reason), timeout=_CLOSE_LIMIT_S if self._thread.is_alive() else 0)
        self._thread.join(_CLOSE_LIMIT_S)

    def _end(self, reason: str) -> None:
        log.warning("record %s ends early: %s", self.folder, reason)
        self._end_reason = reason

    def _run(self) -> None:
        with self._file:
            while True:
                item = self._queue.get()
                try:
                    if isinstance(item, EndLine):
                        self._write(item)
                        return
                    line, groups = item
                    self._write_chunk(line, groups)
                except OSError as error:
                    self._end(str(error))
                    return
                except Exception as error:  # the edge of this thread: what breaks the record must not end the session
                    log.exception("record %s: chunk %d", self.folder, line.index)
                    self._end(one_line(error))
                    return
                finally:
                    self._queue.task_done()

    def _write_chunk(self, line: ChunkLine, groups: Frames) -> None:
        left_out: list[str] = []
        kept = keepable({"events": line.events, "stats": line.stats}, "", left_out)
        if left_out:
            log.warning("record %s: chunk %d is kept without %s", self.folder, line.index, left_out[:4])
        hashes = [frame_hash(frame) for group in groups for frame in group]
        suffix, picture = encode_last_frame(groups[-1][-1])
        self._save(last_frame_path(self.folder, line.index, suffix), picture)
        events = [RecordedEvent(event["kind"], event.get("payload"), event.get("event_id")) for event in kept["events"]]
        self._write(ChunkLine(line.index, events, line.event_id, hashes, kept["stats"]))

    def _save(self, path: Path, data: bytes) -> None:
        self._take_room(len(data))
        with _new_file(path) as file:
            file.write(data)

    def _write(self, line: RecordLine) -> None:
        data = encode_line(line)
        self._take_room(len(data))
        self._file.write(data)
        self._file.flush()

    def _take_room(self, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise OSError("the size limit is reached (--record-max-mb)")


def _new_file(path: Path) -> BinaryIO:
    """Opens a new file that only its owner can read: a record holds what somebody wrote and saw."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))
