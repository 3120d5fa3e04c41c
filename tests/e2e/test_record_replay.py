"""A recorded live session is replayed bit for bit, in process and on a server."""

from __future__ import annotations

import shutil
import time

import pytest

from lingbot_rt.cli import main
from lingbot_rt.client import connect
from lingbot_rt.recording.record_file import read_record
from tests.e2e.served import running, wire

POSES = [[[0.8, 0, 0.6, x], [0, 1, 0, 0.1], [-0.6, 0, 0.8, 2], [0, 0, 0, 1]] for x in (0.1, 0.3, 0.6)]
EVENTS = {
    0: {"kind": "camera_actions", "payload": {"mode": "state", "transitions": [{"actions": ["w"], "client_ts_ms": 1}]}},
    1: {"kind": "camera_poses", "payload": {"poses": POSES, "intrinsics": [60.5, 61, 30, 33], "anchor": "camera"}},
    2: {"kind": "prompt", "payload": {"prompt": "A snowy village at night.", "recache": True}},
    3: {"kind": "camera_actions", "payload": {"mode": "state", "transitions": [{"actions": ["l"]}, {"actions": []}]}},
}


@pytest.fixture(scope="module")
def model_flags(golden):
    return ["--model-path", str(golden("e2e/model")), "--device", "cpu", "--dtype", "float32", "--warmup", "false"]


@pytest.fixture(scope="module")
def server(golden, model_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    with running(folder, *model_flags, "--record-dir", str(folder / "records")) as it:
        yield it, folder / "records"


@pytest.fixture(scope="module")
def record_folder(server, golden):
    """Records one live session with four events."""
    served, records = server
    before = set(records.iterdir())
    init = {
        "type": "init",
        "prompt": "A quiet street.",
        "first_frame": golden("e2e/first_frame.png").read_bytes(),
        "size": "64x64",
        "fps": 30,
        "realtime_output_pacing": True,  # else the last event may come after the last chunk is planned
        "num_frames": 9,
        "seed": 5,
        "max_chunks": 6,
        "condition_inputs": {"camera_actions": []},
    }
    with wire(served, init) as client:
        for index in range(6):
            client.chunk()
            if index in EVENTS:
                client.send({"type": "event", "event_id": index, **EVENTS[index]})
        with pytest.raises(Exception, match="1000"):
            client.receive()
    (folder,) = set(records.iterdir()) - before
    return folder


def test_the_record_is_complete(record_folder):
    """It has the init, every event, statistics, 69 hashes and an end line."""
    record = read_record(record_folder)
    assert record.session.init["prompt"] == "A quiet street."
    assert record.session.seed == 5
    assert [len(chunk.hashes) for chunk in record.chunks] == [9, 12, 12, 12, 12, 12]
    kinds = [event.kind for chunk in record.chunks for event in chunk.events]
    assert kinds == ["camera_actions", "camera_poses", "prompt", "camera_actions"]
    (prompt,) = [event.payload for chunk in record.chunks for event in chunk.events if event.kind == "prompt"]
    assert prompt == EVENTS[2]["payload"]
    assert all(chunk.stats["chunk_total_ms"] > 0 for chunk in record.chunks)
    assert record.end.reason == "complete"


def test_replay_is_bit_for_bit_in_process_and_on_a_server(record_folder, server, model_flags, capsys):
    """Both replays produce the recorded bytes in every frame."""
    assert main(["replay", str(record_folder), *model_flags]) == 0
    assert "69 of 69 frames bit for bit" in capsys.readouterr().out
    served, _ = server
    assert main(["replay", str(record_folder), "--url", served.http]) == 0
    assert "69 of 69 frames bit for bit" in capsys.readouterr().out


def test_a_postprocessed_session_is_replayed_too(server, golden, model_flags, capsys, tmp_path):
    """Upscaled and interpolated frames are recorded as sent and replayed bit for bit, at their own frame rate."""
    served, records = server
    before = set(records.iterdir())
    fields = {"prompt": "A quiet street.", "first_frame": golden("e2e/first_frame.png"), "size": "64x64", "fps": 10}
    options = {"enable_upscaling": True, "upscaling_scale": 2, "enable_frame_interpolation": True, "max_chunks": 2}
    with connect(served.http, **fields, **options) as session:
        assert len(list(session)) == 17 + 24
    (folder,) = set(records.iterdir()) - before
    assert read_record(folder).playback_fps == 20
    video = tmp_path / "side_by_side"
    assert main(["replay", str(folder), *model_flags, "--video", str(video)]) == 0
    assert "41 of 41 frames bit for bit" in capsys.readouterr().out
    assert len(list(video.iterdir())) == 41


def test_a_client_that_leaves_ends_its_record(server, golden):
    """Chunks sent before it left are recorded, and the end line says ``interrupted``."""
    served, records = server
    before = set(records.iterdir())
    fields = {"prompt": "A quiet street.", "first_frame": golden("e2e/first_frame.png"), "size": "64x64"}
    with connect(served.http, **fields) as session:
        next(frame for frame in session if frame.chunk_index == 2)
    (folder,) = set(records.iterdir()) - before
    deadline = time.monotonic() + 60
    while (record := read_record(folder)).end is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert record.end.reason == "interrupted"
    assert len(record.chunks) >= 2


def test_a_record_that_cannot_be_written_does_not_end_the_session(server, golden):
    """A session runs without a record if its folder can't be made. The log says so."""
    served, records = server
    kept = records.rename(records.with_name("kept"))
    records.write_text("in the way")
    try:
        fields = {"prompt": "A quiet street.", "first_frame": golden("e2e/first_frame.png"), "size": "64x64"}
        with connect(served.http, **fields, max_chunks=1) as session:
            assert len(list(session)) == 9
    finally:
        records.unlink()
        kept.rename(records)
    served.wait_for_log("is not recorded")


def test_a_different_replay_fails(record_folder, model_flags, tmp_path, capsys):
    """A record with a changed seed fails its replay: exit code 1, PSNR in the table."""
    changed = tmp_path / "changed"
    shutil.copytree(record_folder, changed)
    path = changed / "record.jsonl"
    path.write_text(path.read_text().replace('"seed":5', '"seed":6'))
    assert main(["replay", str(changed), *model_flags]) == 1
    out = capsys.readouterr().out
    assert "0 of 69 frames bit for bit" in out
    assert "dB" in out


def test_check_on_a_server(server, model_flags, tmp_path, capsys):
    """Ground truth recorded in process equals the frames a server sends: check record, then check run --url."""
    served, _ = server
    cases = "configs/regression/builtin.toml"
    chosen = ["--only", "held-keys", "--only", "guidance"]
    assert main(["check", "record", cases, "--out", str(tmp_path / "gt"), *chosen, *model_flags]) == 0
    run = ["check", "run", cases, "--gt", str(tmp_path / "gt"), *chosen, "--no-latency", "--url", served.http]
    assert main([*run, "--report", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.count(" ok ") == 2
    assert (tmp_path / "report" / "index.html").exists()
