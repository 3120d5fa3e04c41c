"""Copies from and to pinned memory, each delayed while whatever is free is overwritten.

A missing wait or event shows as NaN or as other frames than those of a run that waits everywhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lingbot_rt.engine.frame_readback import FrameReadback
from lingbot_rt.models.transfer import to_device

from .conftest import DEVICE, delay, frames_of, poison, poison_pinned, synchronize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ieee")]


def test_chunks_under_load_are_those_of_a_serial_run(gpu_pipeline, session_plan, monkeypatch):
    """The copies of frames lag behind, and after each decode all free memory is filled with NaN: six chunks with a
    sliding window, a new prompt and guidance are bit for bit those of a run that waits after each decode."""
    plan = session_plan({}, guidance_scale=2.0)
    push = FrameReadback.push

    def serial(self, pixels, *place):
        push(self, pixels, *place)
        synchronize()

    def loaded(self, pixels, *place):
        delay()
        push(self, pixels, *place)
        _, _, count, height, width = pixels.shape
        poison_pinned(torch.empty(count, height, width, 3, dtype=torch.uint8))
        poison_pinned(torch.empty(4))
        poison()

    monkeypatch.setattr(FrameReadback, "push", serial)
    expected = frames_of(gpu_pipeline, plan)
    monkeypatch.setattr(FrameReadback, "push", loaded)
    for got, chunk in zip(frames_of(gpu_pipeline, plan), expected, strict=True):
        assert np.array_equal(got, chunk)
    assert expected[-1].std() > 1


def test_host_memory_is_kept_until_it_is_copied():
    """What goes up through pinned memory arrives whole, although the copy is late and free pinned memory is
    overwritten."""
    sent = [torch.arange(2**14, dtype=torch.float32) + i for i in range(8)]
    arrived = []
    for host in sent:
        delay()
        arrived.append(to_device(host, DEVICE))
        poison_pinned(host)
    synchronize()
    for got, host in zip(arrived, sent, strict=True):
        assert torch.equal(got.cpu(), host)
