"""The VAE of a session: the server's own, or one in bfloat16 for the sessions that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lingbot_rt.engine.placement import Placement
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.parallelize import FrameDecoder


@dataclass(frozen=True, slots=True)
class Decoding:
    """A VAE, where its weights are, and how its frames are decoded."""

    vae: StreamingVAE
    placement: Placement
    decode: FrameDecoder


class HalfVAE:
    """A second VAE in bfloat16. It is made of the first one's weights when a session first asks for it, and stays."""

    def __init__(self, source: StreamingVAE, set_up: Callable[[StreamingVAE], Decoding]) -> None:
        """``set_up`` puts a new VAE in its place, with the ranks and the compilation of the first one."""
        self._source = source
        self._set_up = set_up
        self._decoding: Decoding | None = None

    @property
    def for_plans(self) -> StreamingVAE:
        """Shapes and dtype only."""
        return self._source.on_meta_in(torch.bfloat16)

    @property
    def missing_bytes(self) -> int:
        """Weights that are still to be made."""
        return 0 if self._decoding is not None else self._source.parameters * torch.bfloat16.itemsize

    def get(self) -> Decoding:
        if self._decoding is None:
            self._decoding = self._set_up(self._source.copy_in(torch.bfloat16))
        return self._decoding
