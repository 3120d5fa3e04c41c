"""Weights are quantized while they are loaded: memory never holds much more than the quantized model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lingbot_rt.engine.dry_run import LiveBytes
from lingbot_rt.engine.memory import weight_bytes
from lingbot_rt.models.checkpoint import CheckpointFolder, load_dit
from lingbot_rt.models.dit import CausalDiT, DiTConfig, split_qkv
from lingbot_rt.models.quantize import quantize_linears
from lingbot_rt.models.schedule import DistilledSchedule
from lingbot_rt.shapes import FrameSize

from .conftest import CPU

CONFIG = DiTConfig(
    num_layers=16, num_attention_heads=4, attention_head_dim=32, ffn_dim=352, text_dim=32, text_len=8, freq_dim=32
)


@pytest.fixture(scope="module", params=[False, True], ids=["files", "dummy"])
def folder(request, tmp_path_factory) -> CheckpointFolder:
    """A transformer whose blocks are most of it, from files and with random weights."""
    path = Path(tmp_path_factory.mktemp("model"))
    if not request.param:
        torch.manual_seed(0)
        state = split_qkv(CausalDiT(CONFIG).to(torch.bfloat16).state_dict())
        (path / "transformer").mkdir()
        state = {name: tensor.clone() for name, tensor in state.items()}
        save_file(state, path / "transformer" / "diffusion_pytorch_model.safetensors")
    return CheckpointFolder(
        path=path,
        dit_config=CONFIG,
        schedule=DistilledSchedule(5.0, (1000,), "stated"),
        default_size=FrameSize(96, 64),
        is_dummy=request.param,
    )


class HeldBytes(LiveBytes):
    """Counts real memory only: tensors of the meta device have none."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


def test_loading_quantizes_as_it_goes(folder):
    """The most bytes alive are those of the fp8 model and less than two of its blocks; the result is the same, bit for
    bit, as that of quantizing after loading, which holds the whole model in bfloat16.
    """
    plain = load_dit(folder, torch.bfloat16, CPU)
    block = weight_bytes(plain.blocks[0])
    expected = copy.deepcopy(plain)
    for each in expected.blocks:
        quantize_linears(each)
    with HeldBytes() as live:
        loaded = load_dit(folder, torch.bfloat16, CPU, quantization="fp8")
    state, wanted = loaded.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name
    assert weight_bytes(loaded) < live.peak < weight_bytes(loaded) + 2 * block
    assert weight_bytes(loaded) + 2 * block < weight_bytes(plain)
