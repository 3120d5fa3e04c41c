"""Prompt -> embeddings: cleaning, tokenizer, UMT5 encoder and a small cache.

Shapes: L the model's text length (512 for LingBot-World), D its text width.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections import OrderedDict
from typing import Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from lingbot_rt.models import to_device

_CACHED_PROMPTS = 16
_SPACE = re.compile(r"\s+")
_HAS_FTFY = importlib.util.find_spec("ftfy") is not None


def clean_prompt(text: str) -> str:
    """Repairs mojibake if ftfy is installed, unescapes HTML twice and collapses white space."""
    if _HAS_FTFY:
        import ftfy

        text = ftfy.fix_text(text)
    return _SPACE.sub(" ", html.unescape(html.unescape(text))).strip()


class PromptEncoder(Protocol):
    """What the pipeline asks of a text encoder."""

    def to(self, device: torch.device) -> Self: ...

    def knows(self, prompt: str) -> bool:
        """Whether ``encode`` runs no network for this prompt."""

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, L, D]."""


class TextEncoder:
    """UMT5 with its tokenizer. It caches the embeddings of the newest prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, text_len: int) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder.requires_grad_(False).eval()
        self._text_len = text_len
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def to(self, device: torch.device) -> TextEncoder:
        self._encoder.to(device)
        return self

    def token_ids(self, prompt: str) -> list[int]:
        """At most L ids, with the end token."""
        return self._tokenizer(clean_prompt(prompt), truncation=True, max_length=self._text_len)["input_ids"]

    def knows(self, prompt: str) -> bool:
        return clean_prompt(prompt) in self._cache

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, L, D] on the encoder's device. Rows after the prompt's tokens are zeros."""
        cleaned = clean_prompt(prompt)
        device = self._encoder.device
        if cleaned in self._cache:
            self._cache.move_to_end(cleaned)
            return self._cache[cleaned].to(device)
        ids = to_device(torch.tensor([self.token_ids(prompt)]), device)
        # The padding rows, which would be masked and then zeroed, are not computed. So no mask is needed, which
        # transformers would read on the host.
        rows = self._encoder(input_ids=ids).last_hidden_state
        embeddings = rows.new_zeros(1, self._text_len, rows.shape[-1])
        embeddings[:, : rows.shape[1]] = rows
        self._cache[cleaned] = embeddings
        if len(self._cache) > _CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return embeddings
