"""Random weights and a stand-in for the tokenizer: ``--load-format dummy`` serves a model's shapes without its files.

Memory and speed are those of the real weights. The weights are not zero: a device that multiplies zeros draws less
power and clocks higher than in real work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

_SEED = 20

_SAMPLES = 2**22 - 3
"""Values that are drawn on a CPU, which takes minutes for all of the 14B. Larger tensors repeat them; the number is
prime, so that rows do not repeat each other.
"""


class RandomWeights:
    """Fills a network with random weights, the same ones at every start on the same kind of device.

    Weights are normal with variance 1 / fan-in, so activations keep their scale. Gains are one, biases zero.
    """

    def __init__(self, device: torch.device) -> None:
        """``device``: where the tensors are that will be filled."""
        self._generator = torch.Generator(device).manual_seed(_SEED)
        self._samples: Tensor | None = None

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        for name, tensor in targets.items():
            if name.endswith("bias"):
                tensor.zero_()
            elif tensor.numel() == tensor.shape[0]:
                tensor.fill_(1.0)
            else:
                self._draw(tensor)
                tensor.mul_(1 / math.sqrt(tensor.shape[1:].numel()))

    def _draw(self, tensor: Tensor) -> None:
        """Standard normal values."""
        if tensor.device.type != "cpu" or tensor.numel() <= _SAMPLES:
            tensor.normal_(generator=self._generator)
            return
        if self._samples is None:
            self._samples = torch.empty(_SAMPLES, dtype=tensor.dtype).normal_(generator=self._generator)
        start = int(torch.randint(_SAMPLES, (), generator=self._generator))
        values = self._samples.roll(-start)
        for part in tensor.view(-1).split(_SAMPLES):
            part.copy_(values[: part.numel()])


_END = 1
_SPECIAL = 3  # ids of padding, end and unknown
_IDS_PER_WORD = 2  # about as many as a real tokenizer gives


class HashTokenizer:
    """Stands in for a tokenizer whose files are not there: a word's ids are its hash. Different words get other ids."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
        """``input_ids``: with ``truncation`` at most ``max_length``, the last one is the end token."""
        ids = [token for word in text.split() for token in self._ids(word)]
        if truncation:
            ids = ids[: max_length - 1]
        return {"input_ids": [*ids, _END % self._vocab_size]}

    def _ids(self, word: str) -> list[int]:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8 * _IDS_PER_WORD).digest()
        words = max(1, self._vocab_size - _SPECIAL)
        numbers = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_IDS_PER_WORD))
        return [(_SPECIAL + number % words) % self._vocab_size for number in numbers]
