"""Dummy models: random weights in the shapes of configurations, without any other file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lingbot_rt.errors import CheckpointError
from lingbot_rt.models import dummy, hub
from lingbot_rt.models.checkpoint import (
    empty_dit,
    empty_text_encoder,
    empty_vae,
    load_dit,
    load_text_encoder,
    load_vae,
    open_checkpoint,
)
from lingbot_rt.models.dummy import HashTokenizer, RandomWeights
from lingbot_rt.models.model_path import PUBLISHED
from lingbot_rt.shapes import FrameSize

from .conftest import CPU
from .test_hub import ID, FakeHub, cache  # noqa: F401


def strip(model: Path) -> None:
    """Leaves only the configurations of a model folder."""
    for path in model.rglob("*"):
        if path.is_file() and path.name != "config.json":
            path.unlink()
    shutil.rmtree(model / "tokenizer")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes(name):
    """The 14B: 18.5 B parameters of DiT, 127 M of VAE, UMT5-XXL; at 832x480, window 18, sink 9, 4 steps."""
    folder = open_checkpoint(name, load_format="dummy")
    sizes = [
        sum(p.numel() for p in network.parameters())
        for network in (empty_dit(folder), empty_vae(folder), empty_text_encoder(folder))
    ]
    assert sizes == [pytest.approx(size, rel=0.01) for size in (18.5e9, 127e6, 5.68e9)]
    assert (folder.dit_config.window_frames, folder.dit_config.sink_frames) == (18, 9)
    assert (folder.default_size, len(folder.schedule.steps)) == (FrameSize(832, 480), 4)
    assert not folder.schedule.assumed


def test_a_published_name_without_dummy_says_what_to_do(monkeypatch):
    """The name has no weights: the error names the option and the other forms, and the hub is not asked."""
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("the hub was asked"))
    for name in PUBLISHED:
        with pytest.raises(CheckpointError, match=rf"--model-path {name}: .*OWNER/NAME.*--load-format dummy"):
            open_checkpoint(name)


def test_only_configurations_are_needed(model):
    """A folder with three config.json is enough for all networks, and two loads give the same weights."""
    strip(model)
    folder = open_checkpoint(str(model), load_format="dummy")
    first, second = (load_dit(folder, torch.float32, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_vae(folder, torch.float32, CPU).dtype == torch.float32
    encoder = load_text_encoder(folder, torch.float32, CPU)
    here, again, there = (encoder.encode(prompt) for prompt in ("A street.", "A  street. ", "A lake."))
    assert here.isfinite().all()
    assert torch.equal(here, again)
    assert not torch.allclose(here, there)
    (model / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config\.json"):
        open_checkpoint(str(model), load_format="dummy")


def test_a_tokenizer_that_is_there_is_used(model, golden):
    """A prompt's ids are those of the real model."""
    for path in model.rglob("*.safetensors"):
        path.unlink()
    real = load_text_encoder(open_checkpoint(str(golden("e2e/model"))), torch.float32, CPU)
    stand_in = load_text_encoder(open_checkpoint(str(model), load_format="dummy"), torch.float32, CPU)
    assert stand_in.token_ids("A quiet street.") == real.token_ids("A quiet street.")
    (model / "tokenizer" / "tokenizer.json").unlink()
    other = load_text_encoder(open_checkpoint(str(model), load_format="dummy"), torch.float32, CPU)
    assert other.token_ids("A quiet street.") != real.token_ids("A quiet street.")


def test_the_builtin_model_can_be_dummy():
    """Its shapes are known without its weights."""
    assert open_checkpoint("builtin", load_format="dummy").default_size == FrameSize(160, 96)


def test_of_a_hub_id_only_small_files_are_fetched(model, cache, monkeypatch):  # noqa: F811
    """Configurations and tokenizer, no weights; the cache of them is enough without the hub."""
    fake = FakeHub(model, cache)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    folder = open_checkpoint(ID, load_format="dummy")
    assert folder.path == fake.snapshot
    assert "transformer/config.json" in fake.fetched
    assert not [name for name in fake.fetched if name.endswith(".safetensors")]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(ID, load_format="dummy").path == fake.snapshot
    with pytest.raises(CheckpointError, match="misses 3 files"):
        open_checkpoint(ID)


def test_random_weights_keep_the_scale_of_activations():
    """Every value is finite, gains are one, biases zero, and a linear's rows have norm 1."""
    weights = RandomWeights(CPU)
    tensors = {"a.weight": torch.empty(64, 256), "a.bias": torch.empty(64), "norm.gamma": torch.empty(8, 1, 1)}
    weights.fill(tensors)
    assert tensors["a.weight"].norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    assert tensors["a.bias"].eq(0).all()
    assert tensors["norm.gamma"].eq(1).all()


def test_large_tensors_are_as_random_as_small_ones(monkeypatch):
    """A tensor of more values than are drawn has the same scale, and no two of its rows, or tensors, are alike."""
    monkeypatch.setattr(dummy, "_SAMPLES", 997)
    first, second = torch.empty(64, 256), torch.empty(64, 256)
    RandomWeights(CPU).fill({"a.weight": first, "b.weight": second})
    for tensor in (first, second):
        assert tensor.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)
        assert torch.linalg.matrix_rank(tensor) == 64
    assert not torch.equal(first, second)


def test_ids_from_words():
    """The same words have the same ids, others have others; ids fit the table, and the end is the end token."""
    tokenizer = HashTokenizer(30_000)
    texts = ["a", "b", "a b", "b a", "a b " * 300, "", "\ud800", *(f"word{i} on" for i in range(2000))]
    ids = [tuple(tokenizer(text, truncation=True, max_length=64)["input_ids"]) for text in texts]
    assert len(set(ids)) == len(texts)
    assert ids[0] == tuple(tokenizer("a", truncation=True, max_length=64)["input_ids"])
    assert max(len(each) for each in ids) == 64
    assert all(0 <= token < 30_000 for each in ids for token in each)
    assert all(each[-1] == 1 for each in ids)
