"""The memory of a session, as planned and as counted while it runs."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from lingbot_rt.engine import memory
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.dry_run import LiveBytes, peak_activations
from lingbot_rt.engine.memory import plan_memory, weight_bytes
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.errors import CapacityError
from lingbot_rt.models.dit import DiTConfig
from lingbot_rt.models.quantize import quantize_linears
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.session.plan import ChunkPlan
from lingbot_rt.shapes import FrameSize

from .test_placement import TINY, tiny_dit

SIZE = FrameSize(160, 96)


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_scale": 2.0}, {"latent_frames": 5, "window_frames": 13}, {"window_frames": 30}],
    ids=["plain", "guided", "long chunks", "large window"],
)
def test_the_plan_is_what_a_session_takes(pipeline, session_plan, changes):
    """The most bytes of tensors alive while a session opens and runs are within 5 % of the plan's."""
    picture = np.zeros((SIZE.height, SIZE.width, 3), np.uint8)
    plan = session_plan({}, size=SIZE, first_frame=picture, prompt=f"a street, {changes}", **changes)
    planned = plan_memory(pipeline, plan)
    still = np.broadcast_to(np.eye(4), (plan.latent_frames, 4, 4))
    with torch.inference_mode(), LiveBytes() as live:
        session = SessionState(pipeline, plan)
        full = -(-plan.window_frames // plan.latent_frames) + 1
        for index in range(full + 1):
            chunk = ChunkPlan(plan.session_id, index, plan.prompt, still, None, recache=index == full - 1)
            run_chunk(pipeline, session, chunk, lambda group: None)
    caches = [session.cache] + ([session.negative.cache] if session.negative else [])
    assert planned.window_bytes == sum(cache.nbytes for cache in caches)
    assert session.features.nbytes <= planned.chunk_bytes
    assert planned.total_bytes == pytest.approx(live.peak, rel=0.05)


class Captured:
    """CapturedForwards that hold so many bytes until they are dropped."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def clear(self) -> None:
        self.nbytes = 0


@pytest.mark.parametrize(
    ("beside", "is_dropped", "opens"), [(10, False, True), (9, True, True), (0, True, True), (-1, False, False)]
)
def test_graphs_make_room(pipeline, session_plan, monkeypatch, beside, is_dropped, opens):
    """The memory of captured forwards is not free. They are dropped where the session fits without them alone.

    ``beside``: bytes that are free beside those that the session needs, with the 10 of the graphs.
    """
    plan, captured = session_plan({}), Captured(10)
    needed = plan_memory(pipeline, plan).total_bytes
    on_gpu = dataclasses.replace(pipeline, device=torch.device("cuda"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed + beside)
    monkeypatch.setattr(pipeline.dit, "captured", captured)
    if opens:
        assert memory.require_room(on_gpu, plan).total_bytes == needed
    else:
        with pytest.raises(CapacityError, match="use window"):
            memory.require_room(on_gpu, plan)
    assert captured.nbytes == (0 if is_dropped else 10)


def test_live_bytes_come_and_go():
    """Views and results written in place count once, and what is dropped is gone."""
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x[10:].view(-1, 10)
        y.add_(1)
        z = x + 1
        assert (live.now, live.peak) == (8000, 8000)
        del z
        assert (live.now, live.peak) == (4000, 8000)
        del x
        assert live.now == 4000
        del y
        assert live.now == 0


def test_the_14b_at_its_size(pipeline):
    """Counted without allocating it: a forward of the 14B at 832x480 takes 0.8 GB beside weights and window."""
    peak = peak_activations(DiTConfig(), pipeline.vae, FrameSize(832, 480), 3, torch.bfloat16, "none")
    assert 0.7e9 < peak.forward < 0.9e9
    fp8 = peak_activations(DiTConfig(), pipeline.vae, FrameSize(832, 480), 3, torch.bfloat16, "fp8")
    assert peak.forward < fp8.forward < 2e9


def test_counting_keeps_no_weights():
    """The cached count of a VAE does not keep the VAE's weights in memory."""
    vae = StreamingVAE(AutoencoderKLWan.from_config({"base_dim": 8, "num_res_blocks": 1}))
    weight = weakref.ref(vae.decoder.conv_in.weight)
    peak_activations(TINY, vae, FrameSize(64, 64), 1, torch.float32, "none")
    del vae
    gc.collect()
    assert weight() is None


def test_fp8_weights_take_a_byte_each():
    """Quantized blocks take a quarter of float32 ones, and a little for scales and biases."""
    dit = tiny_dit(4)
    before = sum(weight_bytes(block) for block in dit.blocks)
    for block in dit.blocks:
        quantize_linears(block)
    after = sum(weight_bytes(block) for block in dit.blocks)
    assert 0.25 * before < after < 0.4 * before
