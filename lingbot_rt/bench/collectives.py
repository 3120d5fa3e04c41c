"""What the ranks say to each other in a chunk, timed alone: at the model's shapes, by the code that the model runs.

P ranks, N tokens of the chunk, n those of this rank, H heads, D head_dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from lingbot_rt.bench.figures import number, significant, table
from lingbot_rt.bench.random_model import Shapes
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.ulysses import UlyssesAttention
from lingbot_rt.parallel.vae_width import WidthShards
from lingbot_rt.shapes import PATCH_SIZE, FrameSize

_ROUNDS = 5
_WARM = 2
_STEADY_FRAME = 2
"""Latent frame from which on every convolution keeps all that it ever keeps."""


@dataclass(frozen=True, slots=True)
class Exchanges:
    """A chunk's exchanges at one model's shapes: a command that every rank follows."""

    size: FrameSize
    latent_frames: int
    layers: int
    heads: int
    head_dim: int
    out_channels: int
    vae: dict[str, Any]  # of diffusers' AutoencoderKLWan
    steps: int
    dtype: torch.dtype
    repeats: int  # calls in each of the rounds whose median is told

    @classmethod
    def of(cls, shapes: Shapes, size: FrameSize, steps: int, dtype: torch.dtype, repeats: int) -> Exchanges:
        dit = shapes.dit
        return cls(
            size=size,
            latent_frames=dit.latent_frames,
            layers=dit.num_layers,
            heads=dit.num_attention_heads,
            head_dim=dit.attention_head_dim,
            out_channels=dit.out_channels,
            vae=shapes.vae,
            steps=steps,
            dtype=dtype,
            repeats=repeats,
        )

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.size.tokens_per_frame


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    ms: float  # of one call, packing and unpacking included
    moved_mb: float  # from rank 0 or to it in one call, whichever is more, in units of 1e6 bytes
    calls: int  # a chunk

    @property
    def gb_per_s(self) -> float:
        return self.moved_mb / self.ms

    @property
    def chunk_ms(self) -> float:
        return self.calls * self.ms


@torch.inference_mode()
def measure(exchanges: Exchanges, ranks: RankGroup, device: torch.device) -> list[Exchange]:
    """Every rank has to call it. Raises PeerLost."""
    dit = _dit_exchanges(exchanges, ranks, device)
    vae = _vae_exchanges(exchanges, ranks, device)
    return [
        Exchange(name, _ms_of(call, ranks, device, exchanges.repeats), _mb_moved(call, ranks), calls)
        for name, call, calls in (*dit, *vae)
    ]


@dataclass(frozen=True, slots=True)
class CollectivesReport:
    model: str
    device: str  # of rank 0
    ranks: int
    torch: str
    dtype: str
    size: str
    steps: int
    repeats: int
    exchanges: list[Exchange]
    ms: dict[str, float]  # a chunk
    total_ms: float  # a chunk
    chunk_ms: float | None  # of the chunk that the shares are of, as given

    @classmethod
    def of(
        cls, asked: Exchanges, found: list[Exchange], *, model: str, device: str, ranks: int, chunk_ms: float | None
    ) -> CollectivesReport:
        return cls(
            model=model,
            device=device,
            ranks=ranks,
            torch=torch.__version__,
            dtype=str(asked.dtype).removeprefix("torch."),
            size=str(asked.size),
            steps=asked.steps,
            repeats=asked.repeats,
            exchanges=found,
            ms={one.name: one.chunk_ms for one in found},
            total_ms=sum(one.chunk_ms for one in found),
            chunk_ms=chunk_ms,
        )


def as_text(report: CollectivesReport) -> str:
    def share(ms: float) -> str:
        return "-" if report.chunk_ms is None else f"{100 * ms / report.chunk_ms:.1f} %"

    rows = [
        [
            one.name,
            significant(one.ms),
            significant(one.moved_mb),
            significant(one.gb_per_s),
            str(one.calls),
            number(one.chunk_ms),
            share(one.chunk_ms),
        ]
        for one in report.exchanges
    ]
    head = ("an exchange", "ms", "MB", "GB/s", "a chunk", "ms a chunk", "of a chunk")
    return "\n".join(
        [
            f"{report.ranks} ranks, {report.device}, torch {report.torch}",
            f"{report.model} at {report.size}, {report.dtype}, {report.steps} steps; median of {_ROUNDS} rounds of "
            f"{report.repeats}, packing included; MB: to rank 0 or from it",
            "",
            table(head, [*rows, ["together", "", "", "", "", number(report.total_ms), share(report.total_ms)]]),
        ]
    )


_Call = Callable[[], object]


def _dit_exchanges(exchanges: Exchanges, ranks: RankGroup, device: torch.device) -> list[tuple[str, _Call, int]]:
    ulysses = UlyssesAttention(ranks)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=exchanges.dtype, device=device)

    count = exchanges.tokens
    own = ranks.split(count)[ranks.rank]
    q, k, v = (random(1, own, exchanges.heads, exchanges.head_dim) for _ in range(3))
    attended = random(1, count, exchanges.heads // ranks.world, exchanges.head_dim)
    flow = random(1, own, exchanges.out_channels * PATCH_SIZE**2)
    forwards = exchanges.layers * (exchanges.steps + 1)
    return [
        # The last of the context pass sends k and v alone; it is counted as the others are.
        ("q, k, v: tokens to heads", lambda: ulysses.to_heads(count, q, k, v), forwards),
        ("attended: heads to tokens", lambda: ulysses.to_tokens(attended), forwards - 1),
        ("flow of all tokens", lambda: ulysses.all_tokens(flow, count), exchanges.steps),
    ]


class _HaloShapes(WidthShards):
    """A decoder on the meta device tells what a real one would exchange."""

    def __init__(self, decoder: Any, ranks: RankGroup) -> None:
        super().__init__(decoder, ranks)
        self.columns: list[tuple[int, ...]] = []
        self.joined: tuple[int, ...] = ()

    def widen(self, own: Tensor) -> Tensor:
        self.columns.append(tuple(own.shape[:-1]))
        return F.pad(own, (1, 1))

    def join(self, own: Tensor) -> Tensor:
        self.joined = tuple(own.shape)
        return own


def _vae_exchanges(exchanges: Exchanges, ranks: RankGroup, device: torch.device) -> list[tuple[str, _Call, int]]:
    with torch.device("meta"):
        vae = StreamingVAE(AutoencoderKLWan.from_config(exchanges.vae))
        latent = torch.zeros(1, vae.z_dim, 1, exchanges.size.latent_height, exchanges.size.latent_width)
    shapes = _HaloShapes(vae.decoder, ranks)
    features = vae.new_features()
    with shapes.decoding(exchanges.size.latent_width):
        for _ in range(_STEADY_FRAME + 1):
            shapes.columns.clear()
            vae.decode_latent_frame(latent, features)
    edges = [torch.randn(*shape, 1, device=device) for shape in shapes.columns]
    own = torch.randn(shapes.joined, device=device)

    def halos() -> None:
        with shapes.decoding(exchanges.size.latent_width):
            for edge in edges:
                WidthShards.widen(shapes, edge)

    def join() -> None:
        with shapes.decoding(exchanges.size.latent_width):
            WidthShards.join(shapes, own)

    return [
        (f"a latent frame's {len(edges)} halos", halos, exchanges.latent_frames),
        ("pixels to rank 0", join, exchanges.latent_frames),
    ]


def _ms_of(call: _Call, ranks: RankGroup, device: torch.device, repeats: int) -> float:
    def round_of(count: int) -> float:
        # Together at the start: what one rank waits for another is no cost of the exchange.
        ranks.agree(True)
        begun = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - begun) / count

    round_of(_WARM)
    return statistics.median(round_of(repeats) for _ in range(_ROUNDS))


def _mb_moved(call: _Call, ranks: RankGroup) -> float:
    before = ranks.moved_bytes
    call()
    return (ranks.moved_bytes - before) / 1e6
