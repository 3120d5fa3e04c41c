"""Values of a model's JSON files: the error names file, key, value and what is expected."""

from __future__ import annotations

import json

import pytest

from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.shapes import FrameSize

from .conftest import load_all, refusal, rewrite

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
DIT, VAE, TEXT = "transformer/config.json", "vae/config.json", "text_encoder/config.json"

WHOLE_NUMBERS = {
    DIT: (
        *("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "out_channels"),
        *("text_dim", "text_len", "freq_dim", "num_frames_per_block", "sink_size", "sliding_window_num_frames"),
    ),
    VAE: ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels"),
    TEXT: ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "relative_attention_num_buckets"),
}
NUMBERS = {SCHEDULER: ("shift",), DIT: ("eps",), TEXT: ("layer_norm_epsilon", "dropout_rate"), VAE: ("dropout",)}


def refused(model, file, key, value, expected) -> None:
    rewrite(model / file, lambda values: values.update({key: value}))
    message = refusal(model)
    assert str(model / file) in message
    assert f"{key} is {json.dumps(value)}, expected " in message
    assert expected in message


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in WHOLE_NUMBERS.items() for key in keys])
def test_whole_numbers(model, file, key):
    """null, text, lists, booleans, fractions, infinity and numbers out of range are refused for every whole number."""
    for value in (None, "48", [48], {}, True, 2.5, -1, 10**30, float("inf"), float("nan")):
        refused(model, file, key, value, " to ")


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in NUMBERS.items() for key in keys])
def test_numbers(model, file, key):
    """null, text, lists, booleans, negative and infinite values are refused for every number."""
    for value in (None, "5.0", [5.0], True, -1.0, float("inf"), float("nan"), 10**60):
        refused(model, file, key, value, "a number")


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        (SCHEDULER, "shift", 0, "above 0"),
        (SCHEDULER, "dmd_denoising_steps", None, "a list"),
        (SCHEDULER, "dmd_denoising_steps", 1000, "a list"),
        (SCHEDULER, "dmd_denoising_steps", [], "a list"),
        (SCHEDULER, "dmd_denoising_steps", [1000, "500"], "a whole number from 1 to 1000"),
        (SCHEDULER, "dmd_denoising_steps", [1000, 2000], "a whole number from 1 to 1000"),
        (SCHEDULER, "dmd_denoising_steps", [500, 1000], "from high to low"),
        (SCHEDULER, "dmd_denoising_steps", [500, 500], "each once"),
        (INDEX, "default_size", [160, 96], "WIDTHxHEIGHT"),
        (INDEX, "default_size", None, "WIDTHxHEIGHT"),
        (INDEX, "default_size", 160, "WIDTHxHEIGHT"),
        (INDEX, "default_size", "", "WIDTHxHEIGHT"),
        (INDEX, "default_size", "large", "WIDTHxHEIGHT"),
        (INDEX, "default_size", "0x0", "multiples of 16"),
        (INDEX, "default_size", "100x100", "multiples of 16"),
        (INDEX, "_class_name", "StableDiffusionPipeline", "LingBot-World"),
        (INDEX, "_class_name", 5, "LingBot-World"),
        (DIT, "_class_name", "FluxTransformer2DModel", "LingBot-World"),
        (DIT, "_class_name", ["CausalLingBotWorldTransformer3DModel"], "LingBot-World"),
        (DIT, "patch_size", 2, "[1, 2, 2]"),
        (DIT, "patch_size", [1, 1, 1], "[1, 2, 2]"),
        (DIT, "attention_head_dim", 15, "a multiple of 2"),
        (VAE, "_class_name", "AutoencoderKL", "AutoencoderKLWan"),
        (VAE, "dim_mult", 4, "a list"),
        (VAE, "dim_mult", [1, None], "a whole number"),
        (VAE, "temperal_downsample", [0, 1, 1], "true or false"),
        (VAE, "temperal_downsample", [True], "3 values"),
        (VAE, "latents_mean", None, "a list"),
        (VAE, "latents_mean", [0.0] * 3, "16 values"),
        (VAE, "latents_std", [0.0] * 16, "above 0"),
        (VAE, "attn_scales", "none", "a list"),
        (VAE, "is_residual", "false", "true or false"),
        (VAE, "is_residual", 0, "true or false"),
        (VAE, "patch_size", "2", "a whole number"),
        (VAE, "in_channels", 12, "3: the colours"),
        (TEXT, "model_type", "bert", "umt5"),
        (TEXT, "architectures", ["BertModel"], "UMT5"),
        (TEXT, "architectures", "UMT5EncoderModel", "UMT5"),
        (TEXT, "feed_forward_proj", None, "an activation"),
    ],
)
def test_other_values(model, file, key, value, expected):
    """Every value that is read has to be of its kind and range, and of the architecture that is served."""
    refused(model, file, key, value, expected)


def test_long_values_are_shortened(model):
    """A value of any length makes one line."""
    rewrite(model / INDEX, lambda values: values.update(default_size="x" * 10**5))
    assert len(refusal(model)) < 500


@pytest.mark.parametrize("file", [INDEX, SCHEDULER, DIT, VAE, TEXT, "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", ["[1, 2]", "null", '"text"', "[" * 10**5, "{'a': 1}"])
def test_files_that_hold_no_object(model, file, content):
    """JSON of another form, nested too deep or in another notation is refused with the file's path."""
    (model / file).write_text(content)
    assert str(model / file) in refusal(model)


def test_legal_forms(model):
    """Whole numbers may be written as floats, a file may begin with a byte order mark, and unknown keys are ignored."""
    rewrite(model / DIT, lambda values: values.update(num_layers=2.0, unknown={"a": None}))
    rewrite(model / SCHEDULER, lambda values: values.update(shift=5, dmd_denoising_steps=[1000.0, 500]))
    rewrite(model / VAE, lambda values: values.update(unknown=None))
    rewrite(model / INDEX, lambda values: values.update(default_size=" 160X96 ", _class_name="WanImageToVideoPipeline"))
    text = (model / INDEX).read_text()
    (model / INDEX).write_text(text, encoding="utf-8-sig")
    folder = open_checkpoint(str(model))
    assert (folder.schedule.shift, folder.schedule.steps) == (5.0, (1000, 500))
    assert folder.default_size == FrameSize(160, 96)
    assert folder.dit_config.num_layers == 2
    load_all(model)


def test_values_that_only_a_library_reads(model):
    """A value that transformers refuses is an error that names the file."""
    rewrite(model / TEXT, lambda values: values.update(feed_forward_proj="no-such-activation"))
    assert str(model / TEXT) in refusal(model)


def test_a_vae_of_other_strides(model):
    """A VAE with 16 pixels per latent cell is refused with both numbers."""
    rewrite(model / VAE, lambda values: values.update(patch_size=2, in_channels=12, out_channels=12))
    message = refusal(model)
    assert str(model / VAE) in message
    assert "16 pixels" in message
    assert "expected 8 pixels" in message
