"""Mutated picture files of every format that is read, and ``data:`` URLs: a picture or one line, within bounds."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from functools import cache
from random import Random

import numpy as np
from PIL import Image

from lingbot_rt.errors import InvalidFirstFrame
from lingbot_rt.server.first_frame import decode_picture
from lingbot_rt.server.pictures.data_url import read_data_url
from lingbot_rt.server.pictures.files import PictureFile, read_picture_file
from lingbot_rt.server.pictures.kinds import formats
from lingbot_rt.shapes import FrameSize
from scripts.fuzz_targets.bounds import check_refusal, mutated, noted, within

BASE_BYTES = 96 * 2**20
BYTES_PER_PIXEL = 16
"""Memory that a picture may take while it is decoded, beside the bytes of its file."""

SIZE = FrameSize(64, 48)
_MARK = b"\x89PNG\r\n\x1a\n"


def try_case(random: Random) -> str:
    files = corpus()
    name, data = random.choice(files)
    others = [random.choice(files)[1], random.choice(files)[1]]
    if random.random() < 0.95:
        data = mutated(data, random, others=others)
    if data.startswith(_MARK) and random.random() < 0.8:
        data = with_checksums(data)
    with noted((name, data)):
        if random.random() < 0.1:
            return _try_url(data, random, others)
        return _try_file(data)


def _try_url(data: bytes, random: Random, others: list[bytes]) -> str:
    head = random.choice(("data:image/png;base64,", "data:,", "DATA:image/jpeg; base64 ,", "data:;base64,%3d"))
    body = base64.b64encode(data) if random.random() < 0.7 else b"".join(b"%%%02X" % byte for byte in data)
    url = (head.encode() + mutated(body, random, others=[*others, b"%%%25=\n ="], most=2)).decode("latin-1")
    with within(BASE_BYTES + 16 * len(url)):
        try:
            assert isinstance(read_data_url(url), bytes)
        except InvalidFirstFrame as error:
            return check_refusal(error)
    return "data: URL"


def _try_file(data: bytes) -> str:
    with within(BASE_BYTES + 16 * len(data)):
        try:
            picture = read_picture_file(data)
        except InvalidFirstFrame as error:
            return check_refusal(error)
    with noted((picture.format, picture.width, picture.height)), within(_most_bytes(picture, data)):
        try:
            pixels = decode_picture(data, SIZE)
        except InvalidFirstFrame as error:
            return f"{check_refusal(error)} (pixels)"
    assert pixels.dtype == np.uint8
    assert pixels.shape == (SIZE.height, SIZE.width, 3)
    return picture.format


def _most_bytes(picture: PictureFile, data: bytes) -> int:
    return BASE_BYTES + BYTES_PER_PIXEL * picture.width * picture.height + 16 * len(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold: a decoder reads on where it would have stopped."""
    content, at = bytearray(data), len(_MARK)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(content)


@cache
def corpus() -> list[tuple[str, bytes]]:
    """(name, file) of small pictures in every format, kind and compression that can be made here."""
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 32, 3), np.uint8)).resize((48, 36))
    grey, rgba, indexed = rgb.convert("L"), rgb.convert("RGBA"), rgb.quantize(16)
    rgba.putalpha(grey)
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    bits = rgb.convert("1")
    exif = Image.Exif()
    exif[0x0112] = 6
    film = {"save_all": True, "append_images": [rgb.rotate(90).resize(rgb.size)], "duration": 50}
    made: list[tuple[Image.Image, str, dict[str, object]]] = [
        *((image, "PNG", {}) for image in (rgb, grey, rgba, indexed, wide, bits)),
        (rgb, "PNG", {"exif": exif}),
        *((image, "JPEG", {}) for image in (rgb, grey, rgb.convert("CMYK"))),
        (rgb, "JPEG", {"progressive": True, "exif": exif}),
        *((image, "WEBP", {"lossless": lossless}) for image in (rgb, rgba) for lossless in (False, True)),
        (rgb, "WEBP", {"exif": exif} | film),
        *((image, "GIF", {}) for image in (indexed, grey)),
        (indexed, "GIF", film | {"append_images": [indexed.rotate(90)]}),
        *((image, "BMP", {}) for image in (rgb, indexed, bits, rgba)),
        *(
            (rgb, "TIFF", {"compression": kind})
            for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        (bits, "TIFF", {"compression": "group4"}),
        (wide, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"big_tiff": True}),
        *((image, "AVIF", {}) for image in (rgb, rgba)),
        (rgb, "AVIF", {"exif": exif}),
        *((image, "JPEG2000", {}) for image in (rgb, grey)),
        (rgb, "JPEG2000", {"no_jp2": True, "num_resolutions": 2}),
        *((image, "PPM", {}) for image in (rgb, grey, wide, bits)),
        *((image, "PCX", {}) for image in (rgb, indexed, bits)),
        (rgba, "ICO", {"sizes": [(16, 16), (32, 32)]}),
        (rgba, "ICO", {"sizes": [(16, 16)], "bitmap_format": "bmp"}),
        (rgba.resize((128, 128)), "ICNS", {}),
        *((image, "QOI", {}) for image in (rgb, rgba)),
        *((image, "TGA", {"compression": kind}) for image in (rgb, indexed, rgba) for kind in (None, "tga_rle")),
    ]
    files = []
    for image, plugin, options in made:
        if plugin in formats().values() and plugin in Image.SAVE:
            out = io.BytesIO()
            image.save(out, plugin, **options)
            files.append((f"{plugin} {image.mode}", out.getvalue()))
    plain = " ".join(map(str, np.asarray(rgb).ravel()))
    files += [
        ("PPM plain", f"P3\n# text\n48 36 255\n{plain}".encode()),
        ("PBM plain", b"P1 48 36\n" + b"1 0 " * (24 * 36)),
        ("BMP RLE", _run_length_bitmap()),
        ("CUR", b"\0\0\2\0" + next(data for name, data in files if name.startswith("ICO"))[4:]),
    ]
    return files


def _run_length_bitmap() -> bytes:
    rows = b"".join(bytes((48, row, 0, 0)) for row in range(36)) + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 48, 36, 1, 8, 1, len(rows), 0, 0, 256, 0)
    colours = b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
    start = 14 + len(header) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + colours + rows
