"""What goes wrong inside a chunk or a session's opening: told once, and the next session is not touched."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import msgspec
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lingbot_rt.config import ENDPOINT
from lingbot_rt.engine import chunk_runner, compilation, session_state
from lingbot_rt.engine import engine as engine_module
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.engine import Engine
from lingbot_rt.engine.frame_readback import FrameReadback
from lingbot_rt.engine.memory import _malloc_trim, release_unused
from lingbot_rt.engine.progress import POLL_S, ThreadProgress
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import EngineFailed, UnsoundFrames, public_text
from lingbot_rt.session.plan import ChunkPlan
from tests.preloaded import PreloadedProcess

LIMIT_S = 60


@pytest.fixture
async def engine(golden_config):
    engine = Engine(golden_config)
    await engine.start()
    yield engine
    await engine.stop()


def chunk(plan, index: int = 0) -> ChunkPlan:
    poses = np.broadcast_to(np.eye(4), (plan.latent_frames, 4, 4))
    return ChunkPlan(plan.session_id, index, plan.prompt, poses, None)


async def frames_of(engine, plan, index: int = 0) -> np.ndarray:
    return np.concatenate([group.pixels async for group in engine.run(chunk(plan, index))])


STAGES = {
    "text": (SessionState, "text_kv"),
    "camera": (session_state, "ray_map"),
    "denoise": (chunk_runner.ChunkForward, "flow"),
    "readback": (FrameReadback, "push"),
    "context": (chunk_runner.ChunkForward, "commit"),
    "opening": (engine_module, "SessionState"),
    "closing": (SessionState, "release"),
}
"""Where a session can break: each is a name that the work goes through."""

FAULTS = {
    "error": (RuntimeError("the kernel said no"), "RuntimeError: the kernel said no"),
    "host memory": (MemoryError(), "use a smaller size"),
    "device memory": (torch.OutOfMemoryError("CUDA out of memory"), "use a smaller size"),
    "torch's host memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "use a smaller size"),
}


def raising(error: Exception):
    def broken(*args, **kwargs):
        raise error

    return broken


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_in_any_stage_ends_one_session(engine, session_plan, fault, monkeypatch):
    """It is named, with what to do when memory is short, and the next session gives the frames that it always gives."""
    error, told = FAULTS[fault]

    async def session(session_id: str) -> np.ndarray:
        plan = session_plan({}, session_id=session_id, latent_frames=1, num_steps=1)
        await engine.open(plan)
        frames = await frames_of(engine, plan)
        await engine.close(session_id)
        return frames

    expected = await session("before")
    for stage, name in STAGES.items():
        with monkeypatch.context() as patch:
            patch.setattr(*name, raising(error))
            with pytest.raises(EngineFailed) as failed:
                await session(stage)
        assert told in str(failed.value), stage
        assert not engine.is_lost
        await engine.close(stage)
        assert np.array_equal(await session("after"), expected), stage


def spoiled(latents: torch.Tensor, fault: str) -> torch.Tensor:
    if fault == "constant":
        return torch.full_like(latents, 0.25)
    latents = latents.clone()
    latents[0, 0, -1, 0, 0] = float(fault)
    return latents


@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "constant"])
async def test_latents_that_are_no_picture_end_the_session(engine, session_plan, fault, monkeypatch):
    """One bad value is enough: no frame of that chunk leaves, the error says what happened, the next session works."""
    plan, denoise = session_plan({}), chunk_runner.denoise
    await engine.open(plan)
    assert len(await frames_of(engine, plan)) == 9
    with monkeypatch.context() as patch:
        patch.setattr(chunk_runner, "denoise", lambda *args: spoiled(denoise(*args), fault))
        run, seen = engine.run(chunk(plan, 1)), []
        with pytest.raises(UnsoundFrames, match=r"chunk 1: .*latents") as failed:
            seen += [group async for group in run]
    assert seen == []
    assert ("same value" if fault == "constant" else "NaN") in str(failed.value)
    await engine.close(plan.session_id)
    again = session_plan({}, session_id="again")
    await engine.open(again)
    assert len(await frames_of(engine, again)) == 9


async def test_values_that_are_none_never_reach_a_picture(engine, session_plan, monkeypatch):
    """NaN in the prompt, the camera or the window spoils latents of this chunk or the next: no such frame leaves."""

    def text(*args):
        part = text_kv(*args)
        for tensor in tensors_in(part):
            tensor.fill_(torch.nan)
        return part

    text_kv, ray_map, commit = (getattr(*STAGES[stage]) for stage in ("text", "camera", "context"))
    spoiled_parts = {
        "text": text,
        "camera": lambda *args: torch.full_like(ray_map(*args), torch.nan),
        "context": lambda self, latents: commit(self, torch.full_like(latents, torch.nan)),
    }
    for stage, spoiled_part in spoiled_parts.items():
        plan = session_plan({}, session_id=stage)
        await engine.open(plan)
        with monkeypatch.context() as patch:
            patch.setattr(*STAGES[stage], spoiled_part)
            with pytest.raises(UnsoundFrames, match="NaN"):
                for index in range(2):
                    assert np.ptp(await frames_of(engine, plan, index)) > 0
        await engine.close(stage)
    again = session_plan({}, session_id="again")
    await engine.open(again)
    assert len(await frames_of(engine, again)) == 9


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors of nested lists and tuples, and of what has them as attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, list | tuple) else list(getattr(value, "__dict__", {}).values())
    return [tensor for part in parts for tensor in tensors_in(part)]


async def test_pixels_that_are_no_picture_end_the_session_from_there_on(engine, session_plan, monkeypatch):
    """Groups before the bad one leave, it and those behind it do not."""
    plan, decode, calls = session_plan({}), engine._pipeline.decode, []

    def broken(latent, features):
        pixels = decode(latent, features)
        calls.append(None)
        return torch.full_like(pixels, torch.nan) if len(calls) == 2 else pixels

    await engine.open(plan)
    monkeypatch.setattr(engine, "_pipeline", dataclasses.replace(engine._pipeline, decode=broken))
    run, seen = engine.run(chunk(plan)), []
    with pytest.raises(UnsoundFrames, match="pixels"):
        async for group in run:
            seen.append(group.group_index)
    assert seen == [0]
    assert len(calls) == 3


async def test_a_decode_that_breaks_ends_one_session(engine, session_plan, monkeypatch):
    """Between two latent frames, too: the frames before it leave, the next session works."""
    plan, decode, calls = session_plan({}), engine._pipeline.decode, []

    def broken(latent, features):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latent, features)

    await engine.open(plan)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_pipeline", dataclasses.replace(engine._pipeline, decode=broken))
        run, seen = engine.run(chunk(plan)), []
        with pytest.raises(EngineFailed, match="use a smaller size"):
            async for group in run:
                seen.append(group.group_index)
    assert seen == [0]
    await engine.close(plan.session_id)
    again = session_plan({}, session_id="again")
    await engine.open(again)
    assert len(await frames_of(engine, again)) == 9


def test_an_unsound_chunk_runs_to_its_end(pipeline, session_plan, monkeypatch):
    """Every rank makes the same steps, so that all are ready for the next command."""
    commits, commit, denoise = [], chunk_runner.ChunkForward.commit, chunk_runner.denoise

    def counted(self, latents):
        commits.append(None)
        commit(self, latents)

    monkeypatch.setattr(chunk_runner.ChunkForward, "commit", counted)
    monkeypatch.setattr(chunk_runner, "denoise", lambda *args: spoiled(denoise(*args), "nan"))
    plan = session_plan({})
    with pytest.raises(UnsoundFrames):
        run_chunk(pipeline, SessionState(pipeline, plan), chunk(plan), lambda group: None)
    assert len(commits) == 1


# --- hangs ---


@pytest.fixture
def gate():
    """What hangs until the test is over."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.mark.parametrize("stage", ["denoise", "readback", "opening", "closing"])
async def test_a_thread_that_hangs_loses_the_engine(golden_config, session_plan, stage, gate, monkeypatch):
    """Whatever hangs, whoever waits hears it; the status says why; close and stop return."""
    engine, plan = Engine(dataclasses.replace(golden_config, chunk_timeout_s=0.3)), session_plan({})
    await engine.start()
    monkeypatch.setattr(*STAGES[stage], lambda *args, **kwargs: gate.wait(LIMIT_S))
    if stage == "closing":
        await engine.open(plan)
        await engine.close(plan.session_id)
    else:
        with pytest.raises(EngineFailed, match="--chunk-timeout-s"):
            await engine.open(plan)
            await frames_of(engine, plan)
    assert engine.is_lost
    assert engine.status.stage == "failed"
    assert "no progress for 0.3 s" in engine.status.detail
    with pytest.raises(EngineFailed, match="--chunk-timeout-s"):
        await engine.open(session_plan({}, session_id="next"))
    await engine.close(plan.session_id)
    await engine.stop()


class Thread:
    """A watched thread whose marks and time the test sets."""

    def __init__(self, monkeypatch):
        self.mark, self.now = 0, 1000.0
        self.progress = ThreadProgress(lambda: self.mark)
        monkeypatch.setattr("lingbot_rt.engine.progress.time.monotonic", lambda: self.now)

    def look(self, after_s: float = POLL_S) -> float:
        self.now += after_s
        return self.progress.stalled_s()


def test_time_counts_only_while_a_job_makes_no_progress(monkeypatch):
    """Neither idle time, nor a long job that gets on, nor one job after another."""
    thread = Thread(monkeypatch)
    assert [thread.look() for _ in range(3)] == [0, 0, 0]
    with thread.progress.job():
        assert [thread.look() for _ in range(3)] == [0, POLL_S, 2 * POLL_S]
        thread.mark += 1
        assert [thread.look() for _ in range(2)] == [0, POLL_S]
    assert thread.look() == 0
    for _ in range(3):
        with thread.progress.job():
            assert thread.look() == 0


def test_a_process_that_was_stopped_is_not_a_hang(monkeypatch):
    """After SIGSTOP and SIGCONT, or a machine that slept, the time in between does not count."""
    thread = Thread(monkeypatch)
    with thread.progress.job():
        thread.look()
        assert thread.look(after_s=3600) <= 2 * POLL_S


def test_a_long_forward_on_a_cpu_is_progress():
    """A thread that computes uses CPU time; one that waits does not."""
    progress, computing, gate = ThreadProgress(lambda: 0), threading.Event(), threading.Event()
    computing.set()

    def work():
        with progress.job():
            while computing.is_set():
                sum(range(1000))
            gate.wait(LIMIT_S)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + LIMIT_S
    seen = {progress.cpu_s()}
    while len(seen) < 5 and time.monotonic() < deadline:
        seen.add(progress.cpu_s())
    assert len(seen) >= 5
    computing.clear()
    while "gate.wait" not in progress.stack() or progress.cpu_s() != (last := progress.cpu_s()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.01)
    assert progress.cpu_s() == last
    gate.set()
    thread.join()
    assert progress.cpu_s() == 0


def test_compilation_is_progress():
    """While torch.compile is at work, but only up to a limit, the value changes with every look."""
    seen = []

    def backend(graph, inputs):
        seen.append(compilation.compilations() != compilation.compilations())
        seen.append(compilation.compilations(0.0) == compilation.compilations(0.0))
        return graph.forward

    assert compilation.compilations() == compilation.compilations()
    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    assert seen == [True, True]
    assert compilation.compilations() == compilation.compilations()


async def test_a_device_that_failed_for_good_loses_the_engine(engine, session_plan, monkeypatch):
    """After an error that every later call repeats, the engine says so instead of ready."""
    plan = session_plan({})
    await engine.open(plan)
    monkeypatch.setattr(engine_module, "device_works", lambda device: False)
    monkeypatch.setattr(*STAGES["denoise"], raising(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(EngineFailed, match="illegal memory access"):
        await frames_of(engine, plan)
    await engine.close(plan.session_id)
    assert engine.is_lost
    assert engine.status.stage == "failed"
    assert "illegal memory access" in engine.status.detail


def test_whether_a_device_works(monkeypatch):
    """A device works unless waiting for it raises."""
    assert engine_module.device_works(torch.device("cpu"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert engine_module.device_works(gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError("CUDA error: unspecified launch failure")))
    assert not engine_module.device_works(gpu)


HANGING = """
import sys, time
from lingbot_rt.cli import main
from lingbot_rt.engine import engine
from lingbot_rt.server import app
engine.run_chunk = lambda *args: time.sleep(3600)
app.FAILURE_SHOWN_S = 3.0  # a test that is kept waiting sees it too
sys.exit(main(sys.argv[1:]))
"""


def test_a_hung_server_tells_its_client_and_exits_with_1(golden_config, tmp_path):
    """The client gets the reason and close 1011, /health shows it with 503, and the exit code makes a supervisor
    restart the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--model-path", golden_config.model_path, "--device", "cpu", "--warmup", "false"]
    log = tmp_path / "log"
    command = [sys.executable, "-c", HANGING, "serve", *flags, "--chunk-timeout-s", "1"]
    process = PreloadedProcess(command, log=log)
    try:
        wait_for_health(port, 200, process)
        first_frame = np.zeros((8, 8, 3), np.uint8)
        with connect(f"ws://127.0.0.1:{port}{ENDPOINT}", compression=None) as client:
            client.send(msgspec.msgpack.encode(init_of(first_frame)))
            error = msgspec.msgpack.decode(client.recv(LIMIT_S))
            assert error["type"] == "error"
            assert "--chunk-timeout-s" in error["content"]
            assert "--chunk-timeout-s" in wait_for_health(port, 503, process)["detail"]
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(LIMIT_S)
            assert closed.value.rcvd.code == 1011
        assert process.wait(LIMIT_S) == 1
    finally:
        process.kill()
        process.wait()
    assert "hangs" in log.read_text()


def init_of(pixels: np.ndarray) -> dict:
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return {"type": "init", "prompt": "A street.", "first_frame": header + pixels.tobytes(), "size": "64x64", "fps": 16}


def wait_for_health(port: int, status: int, process: PreloadedProcess) -> dict:
    deadline = time.monotonic() + 4 * LIMIT_S
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                got, body = answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                got, body = error.code, json.load(error)
        except OSError:
            got, body = 0, {}
        if got == status:
            return body
        time.sleep(0.05)


# --- memory and texts ---


async def test_memory_is_given_back_when_a_session_closes(engine, session_plan, monkeypatch):
    """Also on a CPU, whose allocator would keep it."""
    released = []
    monkeypatch.setattr(engine_module, "release_unused", released.append)
    plan = session_plan({})
    await engine.open(plan)
    await engine.close(plan.session_id)
    assert released == [torch.device("cpu")]


def test_a_c_library_that_cannot_trim_is_left_alone(monkeypatch):
    """Nothing happens where there is no such function."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    _malloc_trim.cache_clear()
    try:
        release_unused(torch.device("cpu"))
        assert _malloc_trim() is None
    finally:
        _malloc_trim.cache_clear()


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("no /srv/models/world/vae/config.json here", "no config.json here"),
        (
            "FileNotFoundError: [Errno 2] No such file: '/srv/my models/a.bin'",
            "FileNotFoundError: [Errno 2] No such file: 'a.bin'",
        ),
        ("/models: is empty", "models: is empty"),
        ("cannot identify <_io.BytesIO object at 0x7f3a1c>", "cannot identify <_io.BytesIO object>"),
        ("pointer 0x7f3a1c00 is bad", "pointer  is bad"),
        (
            "see https://world.example/a/b for 3/4 of 832x480, w/o more",
            "see https://world.example/a/b for 3/4 of 832x480, w/o more",
        ),
    ],
)
def test_what_a_client_may_read(text, public):
    """No addresses of objects, of paths only the last name; everything else as it is."""
    assert public_text(text) == public
    content = EngineFailed(text).wire_content
    assert content == f"error during generate loop: {public}"
