"""Frame batches against the reference's messages and against their own decoders."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from lingbot_rt.transport import encode
from lingbot_rt.transport.encode import EncodedBatch, FrameEncoder, OutputFormat, preview_size
from tests.conftest import GOLDEN

CASES = json.loads((GOLDEN / "transport/frame_batch_cases.json").read_text())["cases"]
DELTA = json.loads((GOLDEN / "transport/delta_gzip.json").read_text())
# Left out: content types this server does not have, an empty frame list, sizes that do not come from the pixels.
SENT = [
    case
    for case in CASES
    if case["input"]["content_type"] == "application/x-raw-rgb"
    and case["input"]["metadata_given"]
    and case["input"]["frames_per_batch"]
    and case["input"]["realtime_output_format"]
]


def golden_frames(given: dict) -> np.ndarray:
    """The pictures of a golden case, from its formula."""
    y, x, c = np.meshgrid(np.arange(given["height"]), np.arange(given["width"]), np.arange(3), indexing="ij")
    seeds = [i + 10 * batch for batch in range(given["batches"]) for i in range(given["frames_per_batch"])]
    return np.stack([(3 * x + 5 * y + 40 * c + 17 * seed) % 256 for seed in seeds]).astype(np.uint8)


def undelta(batch: EncodedBatch, last: np.ndarray | None) -> np.ndarray:
    """The frames of a delta-gzip batch behind the frame ``last``, as a client decodes them."""
    deltas = np.frombuffer(gzip.decompress(batch.payload), np.uint8).reshape(-1, batch.height, batch.width, 3).copy()
    if batch.delta_reference == "previous-frame":
        deltas[0] ^= last
    return np.bitwise_xor.accumulate(deltas, axis=0)


def pictures_of(batch: EncodedBatch) -> list[Image.Image]:
    """What a client decodes. The lengths add up to the payload."""
    ends = list(itertools.accumulate(batch.payload_lengths))
    assert ends[-1] == len(batch.payload)
    starts = [0, *ends[:-1]]
    return [Image.open(io.BytesIO(batch.payload[start:end])) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("case", SENT, ids=[case["name"] for case in SENT])
def test_batches_of_the_reference(case):
    """Content type, sizes and raw bytes of each batch are the reference's; pictures have the sizes in the header."""
    given = case["input"]
    encoder = FrameEncoder(
        OutputFormat(given["realtime_output_format"], given["output_compression"], given["realtime_preview_max_width"])
    )
    frames = golden_frames(given)
    per_message = given["frames_per_batch"]
    batches = [
        encoder.encode(part, event_id=given["event_id"])
        for group in np.split(frames, range(per_message, len(frames), per_message))
        for part in encoder.split(group)
    ]
    assert len(batches) == len(case["messages"])
    for batch, message in zip(batches, case["messages"], strict=True):
        header = message["header"]
        assert batch.content_type == header["content_type"]
        assert batch.encoding == header["encoding"]
        assert batch.num_frames == header["num_frames"]
        assert (batch.width, batch.height) == (header["width"], header["height"])
        assert batch.source_width * batch.source_height * 3 == header["bytes_per_frame"]
        if batch.payload_lengths is None:
            assert batch.raw_size == header["raw_size"]
            assert hashlib.sha256(batch.payload).hexdigest() == message["payload_sha256"]
        else:
            assert len(batch.payload_lengths) == batch.num_frames
            assert (batch.source_width, batch.source_height) == (header["source_width"], header["source_height"])
            for picture in pictures_of(batch):
                assert picture.size == (header["preview_width"], header["preview_height"])


def test_delta_messages_of_the_reference():
    """The golden delta stream has the same key frames, references and inflated bytes."""
    frames = [np.frombuffer(base64.b64decode(text), np.uint8).reshape(4, 6, 3) for text in DELTA["frames_b64"]]
    encoder, last = FrameEncoder(OutputFormat("delta-gzip")), None
    for message in DELTA["messages"]:
        header = message["header"]
        pixels = np.stack([frames[i] for i in message["frames"]])
        batch = encoder.encode(pixels, event_id=header.get("event_id"))
        assert batch.delta_reference == header.get("delta_reference")
        assert batch.raw_size == header["raw_size"]
        inflated = gzip.decompress(batch.payload)
        assert len(inflated) == batch.num_frames * header["bytes_per_frame"]
        assert inflated.hex().startswith(message["inflated_hex"])  # the golden data has the first 32 bytes
        decoded = undelta(batch, last)
        np.testing.assert_array_equal(decoded, pixels)
        last = decoded[-1]


batches = st.lists(
    st.tuples(
        arrays.arrays(np.uint8, st.tuples(st.integers(1, 16), st.just(3), st.just(5), st.just(3))),
        st.none() | st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)


@given(batches)
@settings(max_examples=20)
def test_delta_streams_decode_to_what_was_sent(sent):
    """Whatever the frames and event ids, a decoder that follows the rules gets every frame back."""
    encoder, last = FrameEncoder(OutputFormat("delta-gzip")), None
    for pixels, event_id in sent:
        batch = encoder.encode(pixels, event_id=event_id)
        decoded = undelta(batch, last)
        np.testing.assert_array_equal(decoded, pixels)
        last = decoded[-1]


@pytest.mark.parametrize("has_isal", [True, False])
def test_both_gzip_libraries_give_gzip(monkeypatch, has_isal):
    """With and without isal the payload is one gzip member."""
    if has_isal:
        pytest.importorskip("isal")
    monkeypatch.setattr(encode, "_HAS_ISAL", has_isal)
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    batch = FrameEncoder(OutputFormat("delta-gzip")).encode(frames, event_id=None)
    np.testing.assert_array_equal(undelta(batch, None), frames)


@pytest.mark.parametrize("has_simplejpeg", [True, False])
@pytest.mark.parametrize("name", ["webp", "jpeg"])
def test_pictures_decode_close_to_the_frames(monkeypatch, name, has_simplejpeg):
    """Each picture of a batch decodes at full colour resolution to its own frame, at odd sizes too."""
    if has_simplejpeg:
        pytest.importorskip("simplejpeg")
    monkeypatch.setattr(encode, "_HAS_SIMPLEJPEG", has_simplejpeg)
    y, x = np.mgrid[:37, :51]
    frames = (
        np.stack([np.stack([x * 4 + 10 * i, y * 5, 200 - x * 2 - 9 * i], axis=-1) for i in range(5)])
        .clip(0, 255)
        .astype(np.uint8)
    )
    batch = FrameEncoder(OutputFormat(name, quality=95)).encode(frames, event_id=None)
    for frame, picture in zip(frames, pictures_of(batch), strict=True):
        decoded = np.asarray(picture.convert("RGB")).astype(int)
        assert decoded.shape == frame.shape
        assert np.abs(decoded - frame).mean() < 3
        if name == "jpeg":
            assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3  # 4:4:4


@given(
    name=st.sampled_from(["webp", "jpeg"]),
    pixels=arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.just(3)), fill=st.nothing()
    ),
    limit=st.none() | st.integers(1, 24),
)
@settings(max_examples=12)
def test_lengths_split_the_payload(name, pixels, limit):
    """Whatever the count and size, the payload is exactly one picture per frame, each of the size in the header."""
    batch = FrameEncoder(OutputFormat(name, preview_max_width=limit)).encode(pixels, event_id=None)
    pictures = pictures_of(batch)
    assert len(pictures) == batch.num_frames == len(pixels)
    assert {picture.size for picture in pictures} == {(batch.width, batch.height)}
    assert (batch.source_height, batch.source_width) == pixels.shape[1:3]
    assert batch.raw_size == pixels.nbytes


def test_quality_sets_the_size_of_pictures():
    """A lower quality gives fewer bytes; none given means 90 for webp and 95 for jpeg."""
    frame = np.random.default_rng(1).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)
    for name, default in (("webp", 90), ("jpeg", 95)):
        sizes = {
            quality: FrameEncoder(OutputFormat(name, quality)).encode(frame, event_id=None).payload
            for quality in (30, default, None)
        }
        assert len(sizes[30]) < len(sizes[default])
        assert sizes[None] == sizes[default]


@pytest.mark.parametrize("name", ["raw", "delta-gzip", "webp", "jpeg"])
def test_strides_of_the_frames_do_not_matter(name):
    """A view with channels first in memory gives the bytes of its contiguous copy."""
    planar = np.random.default_rng(2).integers(0, 256, (4, 3, 6, 8), dtype=np.uint8)
    view = planar.transpose(0, 2, 3, 1)
    batches = [
        FrameEncoder(OutputFormat(name)).encode(frames, event_id=None) for frames in (view, np.ascontiguousarray(view))
    ]
    assert batches[0] == batches[1]


def test_the_delta_reference_is_the_encoders_own():
    """A caller may reuse its buffer for the next frames: the next delta stays right."""
    encoder, buffer = FrameEncoder(OutputFormat("delta-gzip")), np.full((1, 2, 2, 3), 9, np.uint8)
    encoder.encode(buffer, event_id=None)
    buffer[:] = 5
    batch = encoder.encode(buffer, event_id=None)
    assert batch.delta_reference == "previous-frame"
    assert gzip.decompress(batch.payload) == bytes([9 ^ 5] * 12)


@pytest.mark.parametrize(("name", "most"), [("webp", 6), ("jpeg", 6), ("raw", 16), ("delta-gzip", 16)])
def test_frames_per_batch(name, most):
    """Six encoded or sixteen raw frames per message, as existing clients expect; the rest comes last."""
    encoder = FrameEncoder(OutputFormat(name))
    pieces = encoder.split(np.zeros((2 * most + 1, 2, 3, 3), np.uint8))
    assert [encoder.encode(pixels, event_id=None).num_frames for pixels in pieces] == [most, most, 1]


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 5000))
def test_previews_only_shrink(width, height, limit):
    """A preview is never wider than asked, never larger than the frame, and never empty."""
    preview = preview_size(width, height, limit)
    assert preview[0] == min(width, limit)
    assert 1 <= preview[1] <= max(height, 1)
    assert preview_size(width, height, None) == (width, height)
