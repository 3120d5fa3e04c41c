"""Encoding time and payload size of each transport: the server's encoder beside plain Pillow."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.bench.figures import Spread, number, table
from lingbot_rt.bench.pictures import moving_pictures
from lingbot_rt.config import OUTPUT_FORMATS, FormatName
from lingbot_rt.session.settings import OutputFormat
from lingbot_rt.shapes import VAE_TEMPORAL_STRIDE, FrameSize
from lingbot_rt.transport.encode import DEFAULT_QUALITY, FrameEncoder

Pixels = npt.NDArray[np.uint8]

_WARM_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """Encoding cost per frame."""

    ms: Spread
    mb_per_s: float  # raw pixels encoded, in units of 1e6 bytes
    kb: float  # payload, in units of 1e3 bytes


@dataclass(frozen=True, slots=True)
class TransportReport:
    size: str
    frames: int
    frames_per_batch: int
    cores: int
    quality: dict[str, int]
    encoder: dict[str, Cost]  # the server's FrameEncoder, by transport
    pillow: dict[str, Cost]  # Pillow's defaults at the same quality, frame by frame; delta-gzip is compared with PNG


def measure_transport(size: FrameSize, frames: int, on_encoder: Callable[[], object]) -> TransportReport:
    """Measures both encoders of every transport. Calls ``on_encoder`` after each of the eight.

    A batch has 4 frames, like a latent frame from the engine. The first two batches are not counted.
    """
    batch = VAE_TEMPORAL_STRIDE
    pixels = moving_pictures(size, frames + _WARM_BATCHES * batch)
    encoder: dict[str, Cost] = {}
    pillow: dict[str, Cost] = {}
    for name in OUTPUT_FORMATS:
        encoder[name] = _cost(_server_encoder(name), pixels)
        on_encoder()
        pillow[name] = _cost(_pillow_encoder(name), pixels)
        on_encoder()
    return TransportReport(
        size=str(size),
        frames=frames,
        frames_per_batch=batch,
        cores=os.cpu_count() or 1,
        quality=dict(DEFAULT_QUALITY),
        encoder=encoder,
        pillow=pillow,
    )


def as_text(report: TransportReport) -> str:
    rows = []
    for name in OUTPUT_FORMATS:
        ours, plain = report.encoder[name], report.pillow[name]
        ours_cells = [number(ours.ms.p50, 2), number(ours.ms.p95, 2), number(ours.mb_per_s, 0), number(ours.kb)]
        rows.append([name, *ours_cells, number(plain.ms.p50, 2), number(plain.kb)])
    quality = ", ".join(f"{name} {value}" for name, value in report.quality.items())
    return "\n".join(
        [
            f"{report.frames} moving pictures of {report.size} in batches of {report.frames_per_batch}, "
            f"{report.cores} cores; quality: {quality}",
            "",
            table(("per frame", "p50 ms", "p95 ms", "MB/s in", "kB out", "plain Pillow ms", "kB"), rows),
        ]
    )


def _cost(payload_bytes: Callable[[Pixels], int], pixels: Pixels) -> Cost:
    """``payload_bytes`` encodes a batch [n, H, W, 3] and returns the payload's size."""
    ms_per_frame, payload = [], 0
    batch = VAE_TEMPORAL_STRIDE
    for start in range(0, len(pixels), batch):
        frames = pixels[start : start + batch]
        started = time.perf_counter()
        size = payload_bytes(frames)
        ms = 1000 * (time.perf_counter() - started)
        if start >= _WARM_BATCHES * batch:
            ms_per_frame += [ms / len(frames)] * len(frames)
            payload += size
    spread = Spread.of(ms_per_frame)
    return Cost(ms=spread, mb_per_s=pixels[0].nbytes / 1e6 / (spread.mean / 1000), kb=payload / len(ms_per_frame) / 1e3)


def _server_encoder(name: FormatName) -> Callable[[Pixels], int]:
    encoder = FrameEncoder(OutputFormat(name))
    return lambda frames: len(encoder.encode(frames, event_id=None).payload)


def _pillow_encoder(name: FormatName) -> Callable[[Pixels], int]:
    """The obvious Pillow code for a transport."""
    kind = {"webp": "WEBP", "jpeg": "JPEG"}.get(name, "PNG")
    options = {"quality": DEFAULT_QUALITY[name]} if name in DEFAULT_QUALITY else {}

    def encode(pixels: Pixels) -> int:
        picture = Image.fromarray(pixels)
        if name == "raw":
            return len(picture.tobytes())
        out = io.BytesIO()
        picture.save(out, kind, **options)
        return out.tell()

    return lambda frames: sum(encode(frame) for frame in frames)
