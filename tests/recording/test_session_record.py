"""The record on disk: it reads back as written, and crashes or limits lose only what they must."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import RecordError
from lingbot_rt.recording import session_record
from lingbot_rt.recording.record_file import (
    RECORD_NAME,
    EndLine,
    RecordedEvent,
    frame_hash,
    read_last_frame,
    read_record,
)
from lingbot_rt.recording.session_record import SessionRecorder, make_room, start_record
from lingbot_rt.regression.replay import replay_init
from lingbot_rt.session.message_reader import Unusable
from lingbot_rt.session.messages import Init, PinnedEvent
from lingbot_rt.session.plan import ModelInfo
from lingbot_rt.shapes import FrameSize

MODEL_INFO = ModelInfo("m", "builtin", FrameSize(64, 64), 3, 3, 9, 4, "cpu", "float32")
INIT = {"type": "init", "prompt": "a street", "seed": 7, "size": "64x64"}


def frames(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (4, 8, 8, 3), np.uint8)


@pytest.fixture
def recorder(tmp_path):
    made = SessionRecorder(tmp_path, "s1", INIT, b"picture", MODEL_INFO, 10**6)
    yield made
    made.close("test over")


def test_what_is_written_is_read_back(recorder):
    """Init, first frame, events with their chunk, statistics and frame hashes read back equal."""
    event = RecordedEvent("prompt", "night", 4)
    recorder.chunk(0, [], None, [frames(0)[:1], frames(1)], {"dit_ms": 5})
    recorder.chunk(1, [event], 4, [frames(2)], {"dit_ms": 6})
    recorder.close("the client left")
    record = read_record(recorder.folder)
    assert record.session.init == INIT
    assert record.session.seed == 7
    assert record.first_frame == b"picture"
    assert [chunk.events for chunk in record.chunks] == [[], [event]]
    assert record.chunks[0].hashes == [frame_hash(frame) for frame in [frames(0)[0], *frames(1)]]
    assert record.chunks[1].stats == {"dit_ms": 6}
    assert record.end == EndLine("the client left")
    assert np.array_equal(read_last_frame(recorder.folder, 1), frames(2)[-1])
    assert {"lingbot_rt", "python", "torch"} <= record.session.versions.keys()


def test_a_crash_loses_only_the_line_being_written(recorder):
    """A last line that was cut off is skipped. A damaged line before it is an error with its number."""
    recorder.chunk(0, [], None, [frames(0)], {})
    recorder.chunk(1, [], None, [frames(1)], {})
    recorder.close("")
    path = recorder.folder / RECORD_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b'{"line":"end"') - 20])
    record = read_record(path)
    assert [chunk.index for chunk in record.chunks] == [0]
    assert record.end is None
    path.write_bytes(whole.replace(b'"line":"chunk"', b'"line":"junk"', 1))
    with pytest.raises(RecordError, match="line 2"):
        read_record(path)


ODD = {
    "an extension": msgspec.msgpack.Ext(5, b"x"),
    "what the wire reads of one": Unusable("a MessagePack extension of type 5"),
    "bytes": b"x",
    "not a number": float("nan"),
    "infinity": float("inf"),
    "half a character": "\ud800",
    "a large number": 2**64,
    "a timestamp": datetime.now(UTC),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_cannot_be_kept_is_named(tmp_path, odd, caplog):
    """An odd value in the init, a pinned event, an event or a statistic costs that value, not the record."""
    plan = SimpleNamespace(session_id="s1", first_frame=frames(0)[0], recent_frames=())
    pinned = PinnedEvent(chunk=1, kind="prompt", payload={"a": [1, odd]})
    unread = {"unused": odd, "deep": [{"\x1b" * 1000: odd}], "kept": [1, 2.5, "\u00e9", None]}
    init = Init(prompt="a", first_frame=b"x", condition_inputs=unread, pinned_events=(pinned,))
    recorder = start_record(ServeConfig(record_dir=str(tmp_path)), init, plan, MODEL_INFO)
    recorder.chunk(0, [RecordedEvent("prompt", {"x": odd, "y": 1}, 3)], 3, [frames(0)], {"dit_ms": 5, "odd": odd})
    recorder.close("over")
    record = read_record(recorder.folder)
    assert record.session.init["condition_inputs"] == {"deep": [{}], "kept": unread["kept"]}
    assert record.session.init["pinned_events"][0]["payload"] == {"a": [1, None]}
    places = [line.partition(": ")[0] for line in record.session.left_out]
    assert places[0] == "condition_inputs.unused"
    assert places[1].startswith("condition_inputs.deep[0].'\\x1b")
    assert places[2] == "pinned_events[0].payload.a[1]"
    assert all(len(line) < 250 and line.isprintable() for line in record.session.left_out)
    (chunk,) = record.chunks
    assert (chunk.events, chunk.stats) == ([RecordedEvent("prompt", {"y": 1}, 3)], {"dit_ms": 5})
    assert record.end == EndLine("over")
    assert "condition_inputs.unused" in caplog.text
    assert "events[0].payload.x" in caplog.text


@pytest.mark.parametrize(("asked", "in_force"), [(None, (3, 12)), (True, (3, 12)), (None, ()), (False, ())])
def test_the_interactive_window_is_kept_as_it_was(tmp_path, asked, in_force):
    """Also where it was the server's own setting: a replay runs with the record's, whatever the server's is then."""
    init = Init(prompt="A street.", first_frame=b"x", interactive_kv_window=asked)
    plan = SimpleNamespace(session_id="s1", first_frame=frames(0)[0], recent_frames=in_force)
    kept = start_record(ServeConfig(record_dir=str(tmp_path)), init, plan, MODEL_INFO)
    kept.chunk(0, [], None, [frames(1)], {})
    kept.close("test over")
    assert replay_init(read_record(kept.folder))["interactive_kv_window"] == bool(in_force)


def test_only_the_owner_reads_a_record(tmp_path):
    """Folders have mode 0700 and files 0600, whatever the process' mask is."""
    before = os.umask(0)
    try:
        recorder = SessionRecorder(tmp_path / "new", "s1", INIT, b"picture", MODEL_INFO, 10**6)
        recorder.chunk(0, [], None, [frames(0)], {})
        recorder.close("over")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path / "new", recorder.folder)] == [0o700] * 2
    files = list(recorder.folder.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("moment", ["the first line", "the first frame", "the size limit"])
def test_a_record_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, moment, caplog):
    """Whatever fails before the record has its first line and first frame, the session is served and nothing stays."""

    def fail(*args):
        raise OSError(28, "No space left on device")

    if moment != "the size limit":
        monkeypatch.setattr(SessionRecorder, "_write" if moment == "the first line" else "_save", fail)
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)
    plan = SimpleNamespace(session_id="s1", first_frame=noise, recent_frames=())
    config = ServeConfig(record_dir=str(tmp_path), record_max_mb=1)
    assert start_record(config, Init(prompt="a", first_frame=b"x"), plan, MODEL_INFO) is None
    assert list(tmp_path.iterdir()) == []
    assert "is not recorded: --record-dir" in caplog.text


def test_what_breaks_the_writer_ends_the_record_in_words(recorder, monkeypatch, caplog):
    """The log says what happened, no more chunks are taken, and closing returns."""
    monkeypatch.setattr(session_record, "frame_hash", lambda frame: {}["no such"])
    recorder.chunk(0, [], None, [frames(0)], {})
    recorder._thread.join(30)
    assert not recorder.is_recording
    assert "KeyError: 'no such'" in caplog.text
    recorder.close("over")
    assert read_record(recorder.folder).chunks == []


def test_a_frame_too_large_for_webp_is_kept(recorder):
    """Upscaled frames may be wider than WebP's 16383 pixels."""
    wide = np.random.default_rng(0).integers(0, 255, (1, 8, 16640, 3), np.uint8)
    recorder.chunk(0, [], None, [wide], {})
    recorder.close("over")
    assert np.array_equal(read_last_frame(recorder.folder, 0), wide[0])


def test_a_killed_process_leaves_every_chunk_already_written(tmp_path):
    """After SIGKILL the record has all chunks written so far and no end line."""
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.recording.test_session_record import MODEL_INFO, INIT, SessionRecorder, frames
from pathlib import Path
recorder = SessionRecorder(Path({str(tmp_path)!r}), "s1", INIT, b"picture", MODEL_INFO, 10**6)
for index in range(5):
    recorder.chunk(index, [], None, [frames(index)], {{}})
    while recorder.waiting:
        time.sleep(0.001)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    (folder,) = tmp_path.iterdir()
    record = read_record(folder)
    assert [chunk.index for chunk in record.chunks] == [0, 1, 2, 3, 4]
    assert record.end is None


def test_a_missing_record_is_named(tmp_path):
    """The error names the file."""
    with pytest.raises(RecordError, match=r"record\.jsonl: No such file"):
        read_record(tmp_path)


def test_the_size_limit_ends_the_record_not_the_session(tmp_path, caplog):
    """At --record-max-mb the record stops without an error, and its folder stays within the limit."""
    recorder = SessionRecorder(tmp_path, "s1", INIT, b"picture", MODEL_INFO, 3000)
    for index in range(20):
        recorder.chunk(index, [], None, [frames(index)], {})
        while recorder.waiting and recorder.is_recording:
            time.sleep(0.001)
    recorder.close("")
    assert sum(file.stat().st_size for file in recorder.folder.iterdir()) <= 3000
    assert "--record-max-mb" in caplog.text
    assert 0 < len(read_record(recorder.folder).chunks) < 20


def test_the_oldest_records_are_deleted(tmp_path):
    """The folder of all records stays within --record-total-mb. Other folders in it are left alone."""
    for day in range(4):
        (tmp_path / f"2026010{day}T000000-s").mkdir()
        (tmp_path / f"2026010{day}T000000-s" / RECORD_NAME).write_bytes(bytes(100))
    (tmp_path / "20250101T000000-notes").mkdir()
    make_room(tmp_path, 250)
    assert sorted(path.name[:8] for path in tmp_path.iterdir()) == ["20250101", "20260102", "20260103"]
    make_room(tmp_path / "not there yet", 250)


def test_a_slow_disk_never_delays_a_chunk(tmp_path, monkeypatch, caplog):
    """While the writer is stuck, queueing chunks still returns, and the queue is bounded."""
    stuck = threading.Event()
    monkeypatch.setattr(session_record, "frame_hash", lambda frame: stuck.wait(5) and "0" * 16)
    recorder = SessionRecorder(tmp_path, "s1", INIT, b"picture", MODEL_INFO, 10**6)
    for index in range(20):
        recorder.chunk(index, [], None, [frames(index)[:1]], {})
    assert recorder._queue.qsize() <= 4
    assert "the disk is too slow" in caplog.text
    stuck.set()
    recorder.close("")
