"""Times the collectives of one chunk alone, at the model's shapes and with the code that the model runs.

They go through NCCL or gloo. What GPUs of one host write into each other's memory is not among them.

P ranks, N tokens of the chunk, n those of this rank, H heads, D head_dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_rt.bench.figures import number, significant, table
from lingbot_rt.models.checkpoint import CheckpointFolder
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.ulysses import Packing, UlyssesAttention
from lingbot_rt.parallel.vae_width import join_columns
from lingbot_rt.shapes import PATCH_SIZE, FrameSize

_ROUNDS = 5
_WARM = 2
_STEADY_FRAMES = 4
"""Pixel frames of every latent frame but a session's first."""


@dataclass(frozen=True, slots=True)
class CollectivesSpec:
    """The shapes of a chunk's collectives. Every rank receives it as a command."""

    size: FrameSize
    latent_frames: int
    layers: int
    heads: int
    head_dim: int
    out_channels: int
    steps: int
    dtype_name: str  # of torch
    window_dtype_name: str  # in which k and v cross; q too, as with a kernel that takes queries in fp8
    repeats: int  # calls per round; the median of the rounds is reported

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def window_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.window_dtype_name)
        return dtype

    @classmethod
    def of(
        cls,
        folder: CheckpointFolder,
        size: FrameSize,
        steps: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        repeats: int,
    ) -> CollectivesSpec:
        """``dtypes``: of the networks and of the window."""
        dit = folder.dit_config
        dtype_name, window_dtype_name = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return cls(
            size=size,
            latent_frames=dit.latent_frames,
            layers=dit.num_layers,
            heads=dit.num_attention_heads,
            head_dim=dit.attention_head_dim,
            out_channels=dit.out_channels,
            steps=steps,
            dtype_name=dtype_name,
            window_dtype_name=window_dtype_name,
            repeats=repeats,
        )

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.size.tokens_per_frame


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective, measured."""

    name: str
    ms: float  # per call, unpacking included
    moved_mb: float  # max(bytes sent, bytes received) by rank 0 per call, in units of 1e6 bytes
    calls: int  # per chunk

    @property
    def gb_per_s(self) -> float:
        return self.moved_mb / self.ms

    @property
    def chunk_ms(self) -> float:
        return self.calls * self.ms


@torch.inference_mode()
def measure(spec: CollectivesSpec, ranks: RankGroup, device: torch.device) -> list[Exchange]:
    """Times each collective; every rank must call this. Raises PeerLost."""
    dit = _dit_collectives(spec, ranks, device)
    vae = _vae_collectives(spec, ranks, device)
    return [
        Exchange(name, _ms_of(call, ranks, device, spec.repeats), _mb_moved(call, ranks), calls)
        for name, call, calls in (*dit, *vae)
    ]


@dataclass(frozen=True, slots=True)
class CollectivesReport:
    model: str
    device: str  # of rank 0
    ranks: int
    torch: str
    dtype: str
    kv_cache_dtype: str
    size: str
    steps: int
    repeats: int
    exchanges: list[Exchange]
    ms: dict[str, float]  # per chunk
    total_ms: float  # per chunk
    chunk_ms: float | None  # chunk time that the shares refer to, as given

    @classmethod
    def of(
        cls,
        spec: CollectivesSpec,
        exchanges: list[Exchange],
        *,
        model: str,
        device: str,
        ranks: int,
        chunk_ms: float | None,
    ) -> CollectivesReport:
        return cls(
            model=model,
            device=device,
            ranks=ranks,
            torch=torch.__version__,
            dtype=spec.dtype_name,
            kv_cache_dtype=spec.window_dtype_name,
            size=str(spec.size),
            steps=spec.steps,
            repeats=spec.repeats,
            exchanges=exchanges,
            ms={one.name: one.chunk_ms for one in exchanges},
            total_ms=sum(one.chunk_ms for one in exchanges),
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
    head = ("collective", "ms", "MB", "GB/s", "per chunk", "ms per chunk", "of the chunk")
    return "\n".join(
        [
            f"{report.ranks} ranks, {report.device}, torch {report.torch}",
            f"{report.model} at {report.size}, {report.dtype}, window {report.kv_cache_dtype}, {report.steps} steps; "
            f"median of {_ROUNDS} rounds of {report.repeats} calls, unpacking included; "
            "MB: max(sent, received) by rank 0",
            "",
            table(head, [*rows, ["total", "", "", "", "", number(report.total_ms), share(report.total_ms)]]),
        ]
    )


_Call = Callable[[], object]


def _dit_collectives(spec: CollectivesSpec, ranks: RankGroup, device: torch.device) -> list[tuple[str, _Call, int]]:
    ulysses = UlyssesAttention(ranks)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=spec.dtype, device=device)

    count = spec.tokens
    own = ranks.split(count)[ranks.rank]
    heads = spec.heads // ranks.world
    packing = Packing((spec.window_dtype,) * 3, heads, spec.head_dim)
    qkv = torch.randint(256, (ranks.world, own, packing.nbytes), dtype=torch.uint8, device=device)
    attended = random(1, count, heads, spec.head_dim)
    flow = random(1, own, spec.out_channels * PATCH_SIZE**2)
    forwards = spec.layers * (spec.steps + 1)
    return [
        ("q, k, v: tokens to heads", lambda: ulysses.exchange_heads(qkv, count), forwards),
        ("attended: heads to tokens", lambda: ulysses.to_tokens(attended), forwards - 1),
        ("flow of all tokens", lambda: ulysses.all_tokens(flow, count), spec.steps),
    ]


def _vae_collectives(spec: CollectivesSpec, ranks: RankGroup, device: torch.device) -> list[tuple[str, _Call, int]]:
    width = spec.size.latent_width
    cells = ranks.split(width)[ranks.rank] if width >= ranks.world else width
    own = torch.randn(1, 3, _STEADY_FRAMES, spec.size.height, cells * spec.size.width // width, device=device)
    return [("pixels to rank 0", lambda: join_columns(own, width, ranks), spec.latent_frames)]


def _ms_of(call: _Call, ranks: RankGroup, device: torch.device, repeats: int) -> float:
    def round_of(count: int) -> float:
        # All ranks start together, so that waiting for a late rank is not counted.
        ranks.agree(True)
        started = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - started) / count

    round_of(_WARM)
    return statistics.median(round_of(repeats) for _ in range(_ROUNDS))


def _mb_moved(call: _Call, ranks: RankGroup) -> float:
    before = ranks.moved_bytes
    call()
    return (ranks.moved_bytes - before) / 1e6
