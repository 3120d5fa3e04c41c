"""The golden checkpoint on the accelerator, and ways to delay its streams and to overwrite memory that is free.

``python -m pytest -m gpu`` collects this folder alone. It needs the package's own dependencies, pytest and hypothesis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.plan import ChunkPlan, FrameGroup, SessionPlan
from tests.engine.conftest import golden_config, golden_session, session_plan, small_config  # noqa: F401

DEVICE = torch.device("cuda", 0)

CHUNKS = 6
NEW_PROMPT_AT, NO_CAMERA_AT = 3, 4


@pytest.fixture(scope="session")
def gpu_config(golden_config) -> ServeConfig:  # noqa: F811
    """float32 and not compiled, with the noise of the reference, which is drawn on a CPU."""
    return dataclasses.replace(
        golden_config, device=DEVICE.type, dtype="float32", compile="false", deterministic_noise="cpu"
    )


@pytest.fixture(scope="session")
def gpu_pipeline(gpu_config) -> Pipeline:
    return load_pipeline(gpu_config, lambda status: None)


@pytest.fixture
def ieee(monkeypatch) -> Iterator[None]:
    """float32 convolutions without TF32, and always by the same kernels."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    conv = torch.backends.cudnn.conv
    precision, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = precision


@torch.inference_mode()
def frames_of(pipeline: Pipeline, plan: SessionPlan, chunks: int = CHUNKS) -> list[np.ndarray]:
    """The frames of a session by chunk, with a new prompt and a chunk without camera on the way.

    They are copied when they are handed out. Those of every second group are dropped at once, so that their memory is
    used again; the others must not have changed in the end.
    """
    session, camera, found = SessionState(pipeline, plan), CameraPath(), []
    kept: list[tuple[np.ndarray, np.ndarray]] = []

    def take(group: FrameGroup) -> None:
        groups.append(group.pixels.copy())
        if group.group_index % 2:
            kept.append((group.pixels, groups[-1]))

    for index in range(chunks):
        poses = None if index == NO_CAMERA_AT else camera.extend((("w",),) * plan.latent_frames)
        prompt = plan.prompt if index < NEW_PROMPT_AT else "a forest at night"
        groups: list[np.ndarray] = []
        run_chunk(pipeline, session, ChunkPlan(plan.session_id, index, prompt, poses, None), take)
        found.append(np.concatenate(groups))
    session.release()
    assert all(np.array_equal(now, then) for now, then in kept)
    return found


def synchronize() -> None:
    torch.cuda.synchronize(DEVICE)


def delay() -> None:
    """Keeps the current stream busy for about a tenth of a second."""
    torch.cuda._sleep(200_000_000)  # cycles


def allocated_bytes() -> int:
    synchronize()
    return torch.cuda.memory_allocated(DEVICE)


def poison() -> None:
    """Fills every free block of the current stream's pool with NaN, as whoever allocates next would overwrite it."""
    stream = torch.cuda.current_stream(DEVICE).cuda_stream
    sizes = [
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["stream"] == stream
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    # All at once, so that each gets a block of its own. Bytes of ones are NaN in every floating format.
    taken = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in sorted(sizes, reverse=True)]
    for block in taken:
        block.fill_(255)


def poison_pinned(like: torch.Tensor, count: int = 8) -> None:
    """Overwrites pinned host blocks of the size of ``like`` that are free."""
    taken = [torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(count)]
    for block in taken:
        block.view(torch.uint8).fill_(255)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """What one test has left in work on the device ends before the next."""
    yield
    if torch.cuda.is_initialized():  # not by Triton's interpreter, nor by a test that leaves the device to servers
        synchronize()
