"""Prompt -> embeddings: cleaning, tokenizer, UMT5 encoder and a small cache.

Shapes: L the model's text length (512 for LingBot-World), D its text width.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from lingbot_rt.models.transfer import to_device

_CACHED_PROMPTS = 16
_SPACE = re.compile(r"\s+")
_HAS_FTFY = importlib.util.find_spec("ftfy") is not None


def clean_prompt(text: str) -> str:
    """Repairs mojibake if ftfy is installed, unescapes HTML twice and collapses white space."""
    if _HAS_FTFY:
        import ftfy

        text = ftfy.fix_text(text)
    return _SPACE.sub(" ", html.unescape(html.unescape(text))).strip()


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> Any:
        """A mapping with ``input_ids``, at most ``max_length`` of them with ``truncation``."""


class PromptEncoder(Protocol):
    """What the pipeline asks of a text encoder."""

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, L, D]."""


class TextEncoder:
    """UMT5 with its tokenizer. It caches the embeddings of the newest prompts."""

    def __init__(self, tokenizer: Tokenizer, encoder: UMT5EncoderModel, text_len: int) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder.requires_grad_(False).eval()
        self._device = encoder.device
        self._text_len = text_len
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def offload(self, device: torch.device, stream: Callable[[Sequence[nn.Module]], nn.Module]) -> None:
        """Encodes on ``device`` and keeps the weights on the host. ``stream`` makes of the layers what copies them.

        The table of embeddings is looked up on the host: a prompt takes few of its rows.
        """
        stack: Any = self._encoder.encoder
        stack.block = stream(stack.block)
        stack.final_layer_norm.to(device)
        self._device = device

    def token_ids(self, prompt: str) -> list[int]:
        """At most L ids, with the end token."""
        return self._tokenizer(clean_prompt(prompt), truncation=True, max_length=self._text_len)["input_ids"]

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, L, D] on the encoder's device. Rows after the prompt's tokens are zeros."""
        cleaned = clean_prompt(prompt)
        if cleaned in self._cache:
            self._cache.move_to_end(cleaned)
            return self._cache[cleaned]
        table = self._encoder.shared
        ids = to_device(torch.tensor([self.token_ids(prompt)]), table.weight.device)
        # The padding rows, which would be masked and then zeroed, are not computed. So no mask is needed, which
        # transformers would read on the host.
        rows = self._encoder.encoder(inputs_embeds=to_device(table(ids), self._device)).last_hidden_state
        embeddings = rows.new_zeros(1, self._text_len, rows.shape[-1])
        embeddings[:, : rows.shape[1]] = rows
        self._cache[cleaned] = embeddings
        if len(self._cache) > _CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return embeddings
