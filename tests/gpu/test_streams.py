"""Decode beside the context pass, copies from and to pinned memory: each delayed while whatever is free is overwritten.

A missing wait, ``record_stream`` or event shows as NaN or as other frames than those of a run that waits everywhere.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from lingbot_rt.engine.frame_readback import FrameReadback, to_uint8
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models import to_device

from .conftest import DEVICE, delay, frames_of, poison, poison_pinned, synchronize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ieee")]


def test_the_poison_reaches_what_is_free():
    """Memory that another stream still reads without a ``record_stream`` is overwritten: these tests can fail."""
    other = torch.cuda.Stream(DEVICE)
    for is_recorded in (True, False):
        value = torch.ones(2**20, device=DEVICE)
        other.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(other):
            delay()
            seen = value + 0
        if is_recorded:
            value.record_stream(other)
        del value
        poison()
        synchronize()
        assert seen.isnan().any().item() == (not is_recorded)


def test_chunks_under_load_are_those_of_a_serial_run(gpu_pipeline, session_plan, monkeypatch):
    """The decode lags behind the context pass, and after every step all that is free is filled with NaN: six chunks
    with a sliding window, a new prompt and guidance are bit for bit those of a run that waits around each decode."""
    plan = session_plan({}, guidance_scale=2.0)
    decoding, push = FrameReadback.decoding, FrameReadback.push

    @contextmanager
    def serial(self, latents):
        synchronize()
        with decoding(self, latents):
            yield
        synchronize()

    @contextmanager
    def loaded(self, latents):
        with decoding(self, latents):
            delay()
            yield
            poison()
        poison()  # now on the stream of the context pass

    def poisoned_push(self, pixels, *place):
        push(self, pixels, *place)
        _, _, count, height, width = pixels.shape
        poison_pinned(torch.empty(count, height, width, 3, dtype=torch.uint8))
        poison_pinned(torch.empty(4))
        poison()

    monkeypatch.setattr(FrameReadback, "decoding", serial)
    expected = frames_of(gpu_pipeline, plan)
    monkeypatch.setattr(FrameReadback, "decoding", loaded)
    monkeypatch.setattr(FrameReadback, "push", poisoned_push)
    for got, chunk in zip(frames_of(gpu_pipeline, plan), expected, strict=True):
        assert np.array_equal(got, chunk)
    assert expected[-1].std() > 1


@torch.inference_mode()
def test_latents_are_kept_until_they_are_decoded(gpu_pipeline, session_plan):
    """Latents that are written late and freed early are decoded as by a decode that has waited for everything."""
    plain, streamed = (SessionState(gpu_pipeline, session_plan({}, session_id=name)) for name in ("plain", "streamed"))
    drawn, out = plain.draw((1, 16, 3, 8, 8)), []
    with FrameReadback(DEVICE, plain.postprocessor, lambda group: None) as reading, reading.decoding(drawn):
        decoded = [gpu_pipeline.decode(drawn[:, :, i : i + 1], plain.features) for i in range(3)]
        expected = [to_uint8(pixels).cpu().numpy() for pixels in decoded]
    synchronize()
    latents = torch.zeros_like(drawn)
    delay()
    latents.copy_(drawn)
    with FrameReadback(DEVICE, streamed.postprocessor, out.append) as reading:
        reading.check(latents)
        with reading.decoding(latents):
            delay()
            for i in range(3):
                reading.push(gpu_pipeline.decode(latents[:, :, i : i + 1], streamed.features), 0, i, 3)
        del latents
        poison()
    for group, pixels in zip(out, expected, strict=True):
        assert np.array_equal(group.pixels, pixels)


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
