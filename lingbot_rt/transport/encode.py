"""Pixels -> the payload of one frame batch. Uses numpy, zlib and picture codecs, never torch.

Runs in worker threads: WebP, simplejpeg, gzip and the XOR all release the GIL.
"""

from __future__ import annotations

import importlib.util
import io
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.session.messages import DELTA_GZIP_TYPE, ENCODED_TYPES, RAW_TYPE
from lingbot_rt.session.server_messages import EncodedBatch
from lingbot_rt.session.settings import OutputFormat, preview_size

Pixels = npt.NDArray[np.uint8]

DEFAULT_QUALITY = {"webp": 90, "jpeg": 95}

_GZIP_WBITS = 31
_HAS_SIMPLEJPEG = importlib.util.find_spec("simplejpeg") is not None
_HAS_ISAL = importlib.util.find_spec("isal") is not None
_encoders = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="encode")
"""Encodes the pictures of one batch in parallel."""


class FrameEncoder:
    """The encoder of one session. It keeps the last frame, because the next delta refers to it."""

    def __init__(self, output: OutputFormat) -> None:
        self._output = output
        self._previous: Pixels | None = None
        self._previous_event_id: int | None = None

    def split(self, pixels: Pixels) -> Iterator[Pixels]:
        """Frames [n, H, W, 3] in pieces of one batch each."""
        step = self._output.frames_per_batch
        return (pixels[start : start + step] for start in range(0, len(pixels), step))

    def encode(self, pixels: Pixels, event_id: int | None) -> EncodedBatch:
        """Encodes one piece of ``split``. Calls must be in the order of the stream, one at a time."""
        match self._output.name:
            case "raw":
                return self._raw_batch(RAW_TYPE, "raw", pixels, np.ascontiguousarray(pixels).tobytes())
            case "delta-gzip":
                return self._delta(pixels, event_id)
            case "webp" | "jpeg" as name:
                return self._pictures(pixels, name)

    def _pictures(self, pixels: Pixels, name: Literal["webp", "jpeg"]) -> EncodedBatch:
        _, height, width, _ = pixels.shape
        size = preview_size(width, height, self._output.preview_max_width)
        quality = self._output.quality or DEFAULT_QUALITY[name]
        encode: Callable[[Pixels], bytes] = partial(_CODECS[name], size=size, quality=quality)
        pictures = list(_encoders.map(encode, pixels)) if len(pixels) > 1 else [encode(pixels[0])]
        return EncodedBatch(
            content_type=ENCODED_TYPES[name],
            encoding=name,
            num_frames=len(pictures),
            payload=b"".join(pictures),
            payload_lengths=tuple(len(picture) for picture in pictures),
            width=size[0],
            height=size[1],
            source_width=width,
            source_height=height,
            raw_size=pixels.nbytes,
        )

    def _delta(self, pixels: Pixels, event_id: int | None) -> EncodedBatch:
        """gzip of the frames, each XORed with the frame before it.

        The first frame of a session and the first frame of each new event id are sent as they are.
        """
        is_key = self._previous is None or event_id != self._previous_event_id
        reference = None if is_key else self._previous
        deltas = np.empty(pixels.shape, np.uint8)  # contiguous even if `pixels` is not
        np.bitwise_xor(pixels[1:], pixels[:-1], out=deltas[1:])
        deltas[0] = pixels[0] if reference is None else pixels[0] ^ reference
        self._previous, self._previous_event_id = pixels[-1].copy(), event_id
        told = None if reference is None else "previous-frame"
        return self._raw_batch(DELTA_GZIP_TYPE, "delta-gzip", pixels, _gzip(deltas), told)

    def _raw_batch(
        self, content_type: str, encoding: str, pixels: Pixels, payload: bytes, delta_reference: str | None = None
    ) -> EncodedBatch:
        count, height, width, _ = pixels.shape
        return EncodedBatch(
            content_type=content_type,
            encoding=encoding,
            num_frames=count,
            payload=payload,
            payload_lengths=None,
            width=width,
            height=height,
            source_width=width,
            source_height=height,
            raw_size=pixels.nbytes,
            delta_reference=delta_reference,
        )


def _picture(pixels: Pixels, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)


def _webp(pixels: Pixels, *, size: tuple[int, int], quality: int) -> bytes:
    out = io.BytesIO()
    _picture(pixels, size).save(out, "WEBP", quality=quality, method=0)
    return out.getvalue()


def _jpeg(pixels: Pixels, *, size: tuple[int, int], quality: int) -> bytes:
    if _HAS_SIMPLEJPEG:
        import simplejpeg

        shrunk = np.asarray(_picture(pixels, size)) if size != pixels.shape[1::-1] else np.ascontiguousarray(pixels)
        encoded: bytes = simplejpeg.encode_jpeg(shrunk, quality=quality, colorspace="RGB", colorsubsampling="444")
        return encoded
    out = io.BytesIO()
    _picture(pixels, size).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def _gzip(data: Pixels) -> bytes:
    """gzip at level 1: deltas are mostly zeros, and higher levels take longer to save about a tenth of the size."""
    if _HAS_ISAL:
        from isal import isal_zlib

        packed: bytes = isal_zlib.compress(data.data.cast("B"), 1, _GZIP_WBITS)
        return packed
    deflate = zlib.compressobj(1, zlib.DEFLATED, _GZIP_WBITS)
    return deflate.compress(data.data.cast("B")) + deflate.flush()


_CODECS = {"webp": _webp, "jpeg": _jpeg}
