"""Prompt cleaning against the reference, and the encoder's padding and cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lingbot_rt.models import text_encoder
from lingbot_rt.models.checkpoint import load_text_encoder, open_checkpoint
from lingbot_rt.models.text_encoder import TextEncoder, clean_prompt

from .conftest import CPU


@pytest.fixture(scope="module")
def encoder(golden) -> TextEncoder:
    return load_text_encoder(open_checkpoint(str(golden("e2e/model"))), torch.float32, CPU)


@pytest.mark.parametrize("ftfy", [True, False])
def test_cleaning_equals_the_reference(golden, monkeypatch, ftfy):
    """Every golden prompt comes out as the reference cleans it, with ftfy and without."""
    if ftfy:
        pytest.importorskip("ftfy")
    monkeypatch.setattr(text_encoder, "_HAS_FTFY", ftfy)
    cases = json.loads(golden("text/prompt_clean.json").read_text())["with_ftfy" if ftfy else "without_ftfy"]
    for case in cases:
        assert clean_prompt(case["input"]) == case["expected"], case["input"]


def test_embeddings_equal_the_reference(encoder, golden):
    """The golden prompt's token ids and rows, and zero rows up to the model's text length."""
    init = json.loads(golden("e2e/A1_script/session.json").read_text())["init"]
    with np.load(golden("e2e/A1_script/intermediates.npz")) as data:
        ids, rows = data["token_ids"].reshape(-1), data["prompt_embeds_rows"]
    rows = rows.reshape(-1, rows.shape[-1])
    assert encoder.token_ids(init["prompt"]) == ids[: len(rows)].tolist()
    got = encoder.encode(init["prompt"])
    assert got.shape == (1, 512, 64)
    assert np.abs(got[0, : len(rows)].numpy() - rows).max() <= 2e-5
    assert not got[0, len(rows) :].any()


def test_unpadded_encoding_equals_the_padded_one(encoder):
    """Encoding only the text's rows gives what the reference's rule (pad, mask, zero) gives."""
    ids = torch.tensor([encoder.token_ids("A red house by the sea.")])
    padded = torch.nn.functional.pad(ids, (0, 20))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 20))
    rows = encoder._encoder(input_ids=padded, attention_mask=mask).last_hidden_state[0, : ids.shape[1]]
    got = encoder.encode("A red house by the sea.")[0, : ids.shape[1]]
    assert (got - rows).abs().max() <= 2e-5


def test_long_prompts_are_cut(encoder):
    """A prompt past the text length fills every row and no more."""
    got = encoder.encode("word " * 2000)
    assert got.shape == (1, 512, 64)
    assert got[0, -1].any()


def test_prompts_that_clean_alike_are_one(encoder, monkeypatch):
    """A prompt seen before is not encoded again, whatever its white space; the cache is bounded."""
    calls = []
    stack = encoder._encoder.encoder
    forward = stack.forward
    monkeypatch.setattr(stack, "forward", lambda **kwargs: (calls.append(1), forward(**kwargs))[1])
    first = encoder.encode("a quiet lake")
    assert encoder.encode("  a  quiet lake\n") is first
    assert len(calls) == 1
    for i in range(40):
        encoder.encode(f"prompt {i}")
    assert len(encoder._cache) <= 16
    encoder.encode("a quiet lake")
    assert len(calls) == 42
