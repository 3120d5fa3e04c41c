"""Loading folders, and the errors for those whose tensors do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lingbot_rt.errors import CheckpointError
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.shapes import FrameSize

from .conftest import CPU, rewrite

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = tuple(f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2))


def test_folder_is_read(model):
    """Configurations, schedule and the trained size come from the folder."""
    folder = open_checkpoint(str(model))
    assert (folder.dit_config.num_layers, folder.dit_config.dim, folder.dit_config.text_len) == (2, 48, 512)
    assert (folder.schedule.shift, folder.schedule.steps) == (10.0, (1000, 821, 642, 321))
    assert folder.default_size == FrameSize(832, 480)


def test_schedule_and_size_of_the_folder(model):
    """A v2 schedule and a default size stated by the folder are taken; without a scheduler it is v1."""
    scheduler = model / "scheduler" / "scheduler_config.json"
    rewrite(scheduler, lambda values: values.update(shift=5.0, dmd_denoising_steps=[1000, 750, 500, 250]))
    rewrite(model / "model_index.json", lambda values: values.update(default_size="160x96"))
    folder = open_checkpoint(str(model))
    assert (folder.schedule.shift, folder.schedule.steps) == (5.0, (1000, 750, 500, 250))
    assert folder.default_size == FrameSize(160, 96)
    scheduler.unlink()
    assert open_checkpoint(str(model)).schedule.shift == 10.0


def test_fused_qkv_is_the_three_matrices(model):
    """q, k and v of the file are the rows of the fused linear, and nothing needs gradients."""
    dit = load_dit(open_checkpoint(str(model)), torch.float32, CPU)
    tensors = load_file(model / "transformer" / WEIGHTS)
    parts = [tensors[f"blocks.1.self_attn.{letter}.weight"].float() for letter in "qkv"]
    assert torch.equal(dit.blocks[1].self_attn.qkv.weight, torch.cat(parts))
    assert not any(parameter.requires_grad for parameter in dit.parameters())


def test_shards_and_diffusers_names(model):
    """Weights in two shards under diffusers' names load to the same transformer, with progress up to 1."""
    original = load_dit(open_checkpoint(str(model)), torch.float32, CPU).state_dict()
    names = {
        "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
        "time_projection.1.": "condition_embedder.time_proj.",
        "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
        ".self_attn.o.": ".attn1.to_out.0.",
        ".self_attn.q.": ".attn1.to_q.",
        ".cross_attn.norm_k.": ".attn2.norm_k.",
        ".norm3.": ".norm2.",
        ".ffn.0.": ".ffn.net.0.proj.",
        ".ffn.2.": ".ffn.net.2.",
        "head.modulation": "scale_shift_table",
        ".modulation": ".scale_shift_table",
        "head.head.": "proj_out.",
    }
    whole = {}
    for name, tensor in load_file(model / "transformer" / WEIGHTS).items():
        for theirs, diffusers in names.items():
            if theirs in name:
                name = name.replace(theirs, diffusers)
                break
        whole[name] = tensor
    (model / "transformer" / WEIGHTS).unlink()
    listed = sorted(whole)
    shards = {
        SHARDS[0]: listed[::2],
        SHARDS[1]: listed[1::2],
    }
    for file, keys in shards.items():
        save_file({key: whole[key] for key in keys}, model / "transformer" / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    # A leftover that the index does not name is not read.
    save_file({"stray": torch.zeros(1)}, model / "transformer" / "variant.safetensors")

    done: list[float] = []
    dit = load_dit(open_checkpoint(str(model)), torch.float32, CPU, done.append)
    assert done == sorted(done)
    assert done[-1] == 1
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor, original[name]), name

    (model / "transformer" / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"misses 1 of the 2 shards .*: {SHARDS[1]}"):
        load_dit(open_checkpoint(str(model)), torch.float32, CPU)


LOADERS = {
    "transformer": (load_dit, WEIGHTS, "blocks.0.ffn.0.bias"),
    "vae": (load_vae, WEIGHTS, "quant_conv.bias"),
    "text_encoder": (load_text_encoder, "model.safetensors", "encoder.final_layer_norm.weight"),
}


@pytest.mark.parametrize("part", LOADERS)
def test_keys_that_do_not_fit_are_listed(model, part):
    """A missing, an unexpected and a misshapen key are all named in one error, for every network."""
    load, file, key = LOADERS[part]

    def breaks(tensors):
        misshapen = next(name for name in sorted(tensors) if name != key)
        tensors[misshapen] = torch.zeros(7, 7, 7)
        tensors["stray.weight"] = tensors.pop(key)
        breaks.misshapen = misshapen

    rewrite(model / part / file, breaks)
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(str(model)), torch.float32, CPU)
    message = str(caught.value)
    assert f"1 missing: {key}" in message
    assert "1 unexpected: stray.weight" in message
    assert f"1 misshapen: {breaks.misshapen} [7, 7, 7] for [" in message


def test_damaged_and_absent_files(model):
    """A cut-off file, a folder without weights and a config that is not JSON are each one clear line."""
    folder = open_checkpoint(str(model))
    path = model / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is incomplete or damaged"):
        load_dit(folder, torch.float32, CPU)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}"):
        load_dit(folder, torch.float32, CPU)
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(CheckpointError, match="it has no tokenizer/"):
        open_checkpoint(str(model))
    (model / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer has no tokenizer_config\.json"):
        load_text_encoder(folder, torch.float32, CPU)
    (model / "transformer" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        open_checkpoint(str(model))


def test_parts_that_do_not_fit_each_other(model):
    """A VAE or text encoder of another width than the transformer takes is refused before any weight is read."""
    config = model / "transformer" / "config.json"
    rewrite(config, lambda values: values.update(in_channels=100))
    with pytest.raises(CheckpointError, match="a VAE of 16 channels needs a transformer of 36 channels in and 16 out"):
        open_checkpoint(str(model))
    rewrite(config, lambda values: values.update(in_channels=36, text_dim=32))
    with pytest.raises(CheckpointError, match="text_encoder/ gives 64 features, transformer/ takes 32"):
        open_checkpoint(str(model))
    rewrite(config, lambda values: values.update(text_dim=64, patch_size=[1, 1, 1]))
    with pytest.raises(CheckpointError, match="patch_size"):
        open_checkpoint(str(model))
