"""Which files of a model folder are read, and the one line for each that is missing or not what it seems."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.pipeline import load_pipeline
from lingbot_rt.errors import CheckpointError
from lingbot_rt.models import checkpoint, folder_weights
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint

from .conftest import CPU, load_all, refusal, rewrite

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    f"transformer/{WEIGHTS}",
    "vae/config.json",
    f"vae/{WEIGHTS}",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)
"""Every file of the golden model."""

OPTIONAL = ("model_index.json", "scheduler/scheduler_config.json")


def make_index(part: Path, weight_map: object) -> None:
    (part / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def split(part: Path, name: str = "diffusion_pytorch_model") -> dict[str, str]:
    """The part's weights as two shards without an index. Returns tensor -> file."""
    tensors = load_file(part / f"{name}.safetensors")
    (part / f"{name}.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"{name}-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, part / file)
        weight_map |= dict.fromkeys(names, file)
    return weight_map


def test_the_list_is_that_of_the_golden_model(model):
    """The files below are all that the golden model has, so each case covers every kind of file."""
    assert {path.relative_to(model).as_posix() for path in model.rglob("*.*")} == set(FILES)
    load_all(model)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\n",
            "Git LFS pointer git lfs pull",
        ),
        (b"", "empty fetch"),
        (b"<!DOCTYPE html>\n<html><body>Sign in", "web page fetch"),
        (b"\x00\x01\x02 no such format", "fetch"),
        (b"{", "fetch"),
    ],
    ids=["pointer", "empty", "web-page", "noise", "cut-off"],
)
def test_a_file_of_other_content(model, name, content, words):
    """A file that holds something else is named, with what it is and what to do."""
    (model / name).write_bytes(content)
    message = refusal(model)
    assert str(model / name) in message
    for word in words.split():
        assert word in message


@pytest.mark.parametrize("name", [name for name in FILES if name not in OPTIONAL])
def test_a_file_that_is_missing(model, name):
    """A missing file is named by its folder and name. The optional ones may be missing."""
    (model / name).unlink()
    message = refusal(model)
    assert str((model / name).parent) in message
    assert Path(name).name in message


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_system_does_not_give(model, name, monkeypatch):
    """Without the right to read a file, its path and the system's reason are named."""
    opened = Path.open

    def refuse(self, *args, **options):
        if self == model / name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    message = refusal(model)
    assert str(model / name) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("name", FILES)
def test_a_folder_or_a_dead_link_in_place_of_a_file(model, name):
    """A folder is said to be one. A link to nothing, as of half a hub cache, names its target."""
    (model / name).unlink()
    (model / name).mkdir()
    message = refusal(model)
    assert str(model / name) in message
    assert "folder" in message
    (model / name).rmdir()
    (model / name).symlink_to("../../blobs/gone")
    message = refusal(model)
    assert str(model / name) in message
    assert "blobs/gone" in message


def test_a_pipe_is_not_waited_for(model):
    """A named pipe in place of a file is refused at once."""
    (model / "vae" / "config.json").unlink()
    os.mkfifo(model / "vae" / "config.json")
    assert "no regular file" in refusal(model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_part_that_cannot_be_listed(model, part, monkeypatch):
    """A folder without the right to read it is named with the system's reason, and not taken for an empty one."""
    listdir = os.listdir

    def refuse(path):
        if Path(path) == model / part:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    message = refusal(model)
    assert str(model / part) in message
    assert "Permission denied" in message


def test_a_file_system_that_does_not_map_files(model, monkeypatch):
    """An error of the system while weights are opened or read is named with the path."""

    def refuse(path, framework):
        raise OSError(19, "No such device")

    monkeypatch.setattr(folder_weights, "safe_open", refuse)
    message = refusal(model)
    assert str(model / "transformer" / WEIGHTS) in message
    assert "No such device" in message


def test_memory_that_is_not_there(model, monkeypatch):
    """Weights that do not fit the memory are refused with their size."""

    def refuse(*args, **options):
        raise RuntimeError("not enough memory: you tried to allocate 99 bytes")

    folder = open_checkpoint(str(model))
    monkeypatch.setattr(torch, "empty_like", refuse)
    with pytest.raises(CheckpointError, match=r"vae: its weights take .* GB, more than cpu has free"):
        load_vae(folder, torch.float32, CPU)


def zeros(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}


def test_files_that_are_not_the_model(model, monkeypatch):
    """Second weights, other formats, folders and macOS companions change nothing, and all but the last are listed."""
    expected = {part: load(open_checkpoint(str(model)), torch.float32, CPU) for part, load in LOADERS.items()}
    for part, name in (("transformer", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        second = zeros(model / part / name)
        for other in ("a.safetensors", name.replace(".safetensors", "_ema.safetensors"), "zz.fp16.safetensors"):
            save_file(second, model / part / other)
        (model / part / "pytorch_model.bin").write_bytes(b"\x80")
        (model / part / "backup.safetensors").mkdir()
        (model / part / f"._{name}").write_bytes(b"\0\x05\x16\x07")
        (model / part / f"._{name}.index.json").write_bytes(b"\0\x05\x16\x07")
        (model / part / "._config.json").write_bytes(b"\0\x05\x16\x07")
    (model / "._model_index.json").write_bytes(b"\0\x05\x16\x07")
    (model / "tokenizer" / "._tokenizer.json").write_bytes(b"\0\x05\x16\x07")
    rewrite(model / "model_index.json", lambda v: v.update(image_encoder=["transformers", "X"], other=[None, None]))

    opened = set()
    open_, path_open = builtins.open, Path.open
    monkeypatch.setattr(builtins, "open", lambda path, *a, **o: (opened.add(str(path)), open_(path, *a, **o))[1])
    monkeypatch.setattr(Path, "open", lambda self, *a, **o: (opened.add(str(self)), path_open(self, *a, **o))[1])
    folder = open_checkpoint(str(model))
    for part, load in LOADERS.items():
        for (name, tensor), (_, wanted) in zip(
            parameters(load(folder, torch.float32, CPU)), parameters(expected[part]), strict=True
        ):
            assert torch.equal(tensor, wanted), name
    assert not [path for path in opened if Path(path).name.startswith("._")]
    assert set(folder.left_out) == {
        *(f"{part}/{name}" for part in LOADERS for name in ("a.safetensors", "zz.fp16.safetensors")),
        *(f"{part}/{name}" for part in LOADERS for name in ("pytorch_model.bin", "backup.safetensors/")),
        "transformer/diffusion_pytorch_model_ema.safetensors",
        "vae/diffusion_pytorch_model_ema.safetensors",
        "text_encoder/model_ema.safetensors",
        "image_encoder/",
    }


LOADERS = {"transformer": load_dit, "vae": load_vae, "text_encoder": load_text_encoder}


def parameters(network):
    module = {"StreamingVAE": "_vae", "TextEncoder": "_encoder"}.get(type(network).__name__)
    return (getattr(network, module) if module else network).named_parameters()


def test_what_is_left_out_is_one_line_at_start(model, caplog):
    """A start logs the files that it leaves out in one line, and nothing when there are none."""
    config = ServeConfig(model_path=str(model), device="cpu", warmup=False)
    load_pipeline(config, lambda status: None)
    assert "not loaded" not in caplog.text
    for name in ("transformer/second.safetensors", "vae/old.bin"):
        (model / name).write_bytes(b"")
    load_pipeline(config, lambda status: None)
    lines = [record.getMessage() for record in caplog.records if "not loaded" in record.getMessage()]
    assert len(lines) == 1
    assert "transformer/second.safetensors, vae/old.bin" in lines[0]


def test_weights_without_a_standard_name(model):
    """Weights of any other name, and shards without an index, are not guessed at: they are named in the refusal."""
    part = model / "transformer"
    (part / WEIGHTS).rename(part / "my_world.safetensors")
    message = refusal(model)
    assert f"{part} has no {WEIGHTS}" in message
    assert "my_world.safetensors" in message
    (part / "my_world.safetensors").rename(part / WEIGHTS)
    shards = set(split(part).values())
    message = refusal(model)
    assert all(shard in message for shard in shards)
    assert "index" in message


def test_an_index_beside_a_whole_file(model):
    """Shards by the index and a file of the standard name are two sets of weights: both are named."""
    part = model / "vae"
    whole = (part / WEIGHTS).read_bytes()
    make_index(part, split(part))
    load_all(model)
    (part / WEIGHTS).write_bytes(whole)
    message = refusal(model)
    assert str(part) in message
    assert INDEX in message
    assert f"{WEIGHTS} " in message
    (part / INDEX).unlink()
    load_all(model)
    make_index(part, dict.fromkeys(load_file(part / WEIGHTS), WEIGHTS))
    load_all(model)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, "x", {"a": None}, {"a": 3}, {"a": ["b.safetensors"]}],
)
def test_an_index_of_a_wrong_form(model, weight_map):
    """An index without file names is refused with its path and the key."""
    make_index(model / "transformer", weight_map)
    message = refusal(model)
    assert str(model / "transformer" / INDEX) in message
    assert "weight_map" in message


@pytest.mark.parametrize(
    "name",
    [
        *("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ""),
        *("._a.safetensors", "a\0.safetensors", "..", "a\n.safetensors"),
    ],
)
def test_an_index_that_leads_elsewhere(model, name):
    """An index may name .safetensors files beside it only."""
    make_index(model / "transformer", {"a": name})
    message = refusal(model)
    assert str(model / "transformer" / INDEX) in message
    assert json.dumps(name) in message


def test_an_index_that_is_a_pointer(model):
    """An index that was not fetched is named as any other file is."""
    (model / "transformer" / INDEX).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    message = refusal(model)
    assert str(model / "transformer" / INDEX) in message
    assert "git lfs pull" in message


def test_an_index_that_does_not_fit_its_files(model):
    """Missing shards, tensors that are elsewhere, nowhere, in two shards, or not in the index are all named."""
    part = model / "transformer"
    weight_map = split(part)
    first, second = sorted(set(weight_map.values()))
    moved = next(name for name, file in weight_map.items() if file == first)
    for change in (
        {moved: second},
        {"made.up.weight": first},
    ):
        make_index(part, weight_map | change)
        message = refusal(model)
        assert str(part / INDEX) in message
        assert next(iter(change)) in message
    make_index(part, {name: file for name, file in weight_map.items() if name != moved})
    assert moved in refusal(model)
    make_index(part, weight_map)
    load_all(model)
    rewrite(part / second, lambda tensors: tensors.update({moved: torch.zeros(1)}))
    message = refusal(model)
    assert moved in message
    assert first in message
    assert second in message
    (part / first).unlink()
    assert f"misses 1 of the 2 shards that {INDEX} names: {first}" in refusal(model)


def test_one_tensor_under_two_names(model):
    """A file with a tensor under diffusers' name and the original one is refused with both names."""

    def twice(tensors):
        tensors["blocks.0.attn1.to_q.weight"] = tensors["blocks.0.self_attn.q.weight"].clone()

    rewrite(model / "transformer" / WEIGHTS, twice)
    message = refusal(model)
    assert "blocks.0.attn1.to_q.weight" in message
    assert "blocks.0.self_attn.q.weight" in message


def test_the_shared_table_under_either_name_or_both(model):
    """The text encoder's table loads under each of its names. With both, shared.weight is the one that is read."""
    path = model / "text_encoder" / "model.safetensors"
    wanted = load_file(path)["shared.weight"].float()
    alias = "encoder.embed_tokens.weight"
    rewrite(path, lambda tensors: tensors.update({alias: torch.zeros_like(tensors["shared.weight"])}))
    for _ in range(2):
        encoder = load_text_encoder(open_checkpoint(str(model)), torch.float32, CPU)._encoder
        assert torch.equal(encoder.shared.weight, wanted)
        assert torch.equal(encoder.encoder.embed_tokens.weight, wanted)
        rewrite(path, lambda tensors: tensors.update({alias: tensors.pop("shared.weight", wanted)}))


def test_quantized_weights(model):
    """Whole numbers are refused with the name of the tensor and its type."""
    rewrite(model / "vae" / WEIGHTS, lambda t: t.update({"quant_conv.bias": t["quant_conv.bias"].to(torch.int8)}))
    message = refusal(model)
    assert "quant_conv.bias of type I8" in message


def test_nothing_is_allocated_for_weights_that_do_not_fit(model, monkeypatch):
    """Names and shapes are compared before memory is taken: 37 GB are not read to say that one tensor is missing."""
    rewrite(model / "transformer" / WEIGHTS, lambda tensors: tensors.pop("head.modulation"))
    monkeypatch.setattr(checkpoint, "_allocate", lambda *args: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=r"1 missing: head\.modulation"):
        load_dit(open_checkpoint(str(model)), torch.float32, CPU)


def test_a_tokenizer_that_does_not_fit(model):
    """Ids that the text encoder has no row for are refused at the start, not at the first prompt."""
    rewrite(model / "text_encoder" / "config.json", lambda values: values.update(vocab_size=200))
    message = refusal(model)
    assert "vocab_size of 200" in message
    assert str(model / "tokenizer") in message


def test_code_of_a_model_is_not_run(model):
    """A tokenizer that brings Python code is refused, without a question and without running it."""
    marker = model / "ran"
    (model / "tokenizer" / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")

    def custom(values):
        values.update(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.T", "own.T"]})

    rewrite(model / "tokenizer" / "tokenizer_config.json", custom)
    assert str(model / "tokenizer") in refusal(model)
    assert not marker.exists()


def test_what_model_path_may_be(model, tmp_path, monkeypatch):
    """A file, a path to nothing, an empty one and one that the system refuses are each named as such."""
    assert "is a file" in refusal(model / "model_index.json")
    for missing in (tmp_path / "no" / "such", "./no-such", "a/b/c"):
        assert "there is no such folder" in refusal(missing)
    assert "empty" in refusal(" ")
    assert "File name too long" in refusal("x" * 5000)
    assert "\\x1b" in refusal("/no/\x1b[2J")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_all("~/model")
    assert str(tmp_path / "gone") in refusal("~/gone")


def test_a_folder_around_the_model(model, tmp_path):
    """The folder that holds a model is not the model: the message names the one inside."""
    message = refusal(tmp_path)
    assert f"name {model}" in message
    (tmp_path / "empty").mkdir()
    assert "it has no transformer/, vae/, text_encoder/, tokenizer/" in refusal(tmp_path / "empty")
