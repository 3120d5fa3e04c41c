"""Networks whose weights are on the host while they do not run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lingbot_rt.engine.pipeline import load_pipeline
from lingbot_rt.engine.placement import StreamedBlocks

from .conftest import frames_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ieee")]


@pytest.mark.parametrize("offload", ["dit_cpu_offload", "vae_cpu_offload", "text_encoder_cpu_offload"])
def test_offloaded_networks_compute_the_same(gpu_config, gpu_pipeline, session_plan, offload):
    """Six chunks with a new prompt are those of resident weights, bit for bit, and the weights are not resident."""
    plan = session_plan({})
    offloaded = load_pipeline(dataclasses.replace(gpu_config, **{offload: True}), lambda status: None)
    for got, expected in zip(frames_of(offloaded, plan), frames_of(gpu_pipeline, plan), strict=True):
        assert np.array_equal(got, expected)
    if offload == "dit_cpu_offload":
        assert isinstance(offloaded.dit.blocks, StreamedBlocks)
    elif offload == "vae_cpu_offload":
        assert {parameter.device.type for parameter in offloaded.vae._vae.parameters()} == {"cpu"}
