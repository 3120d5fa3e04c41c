"""Files of pictures: metadata costs nothing and refuses nothing, limits act before anything is decoded."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from lingbot_rt.errors import InvalidInit
from lingbot_rt.server import first_frame
from lingbot_rt.server.first_frame import decode_picture, load_first_frame
from lingbot_rt.server.pictures import files
from lingbot_rt.server.pictures.files import read_picture_file
from lingbot_rt.shapes import FrameSize
from tests.server.pictures import (
    IMAGE,
    MIDDLES,
    ORIENTATION_6,
    QUARTERS,
    SIZE,
    WRONG_TAGS,
    apple_icon,
    bitmap,
    chunk,
    exif,
    gif,
    gif_extension,
    icon,
    jpeg,
    middles,
    png,
    riff,
    saved,
    segment,
    tiff,
    webp,
)

BOMB = zlib.compress(bytes(30_000_000))
"""Zeros, 30 kB long."""

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
RAW_PROFILE = b"\nexif\n      32\n" + (b"Exif\0\0" + exif(ORIENTATION_6)).hex("\n", 36).encode() + b"\n"
XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"
BROKEN_MPO = b"MPF\0MM\0*\0\0\0\x08\xff\xff" + b"\xb0\1\0\7\xff\xff\xff\xff\xff\xff\xff\xff" * 3
TURNED = middles(QUARTERS)[[2, 0, 3, 1]]
"""The quarters of orientation 6, decoded at the same size."""

PLAIN = {
    "text": png(chunk(b"tEXt", b"workflow\0" + b"A" * 3_000_000)),
    "zTXt bomb": png(chunk(b"zTXt", b"workflow\0\0" + BOMB)),
    "iTXt bomb": png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB)),
    "profile bomb": png(chunk(b"iCCP", b"large\0\0" + BOMB)),
    "broken raw profiles": png(
        *(
            chunk(b"zTXt", b"Raw profile type exif\0\0" + text)
            for text in (b"", b"no zlib", BOMB, zlib.compress(b"\n\n\nxy"))
        )
    ),
    "broken zTXt": png(chunk(b"zTXt", b"workflow\0\0no zlib")),
    "unknown compression": png(chunk(b"zTXt", b"workflow\0\x09zzz"), chunk(b"iCCP", b"p\0\x09zzz")),
    "short chunks": png(
        *(chunk(kind, b"\1") for kind in (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tIME", b"eXIf", b"acTL"))
    ),
    "text after the pixels": png(after=[chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB)]),
    "wrong checksum": png(chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0"),
    "cut in a text at the end": png(after=[chunk(b"tEXt", b"a\0" + b"b" * 1000)])[:-500],
    "no end": png()[:-12],
    "odd EXIF in PNG": png(chunk(b"eXIf", exif(*WRONG_TAGS))),
    "no EXIF in PNG": png(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
    "JPEG EXIF": jpeg(segment(0xE1, b"Exif\0\0" + exif(*WRONG_TAGS))),
    "JPEG EXIF without a directory": jpeg(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    "JPEG EXIF cut": jpeg(segment(0xE1, b"Exif\0\0II")),
    "JPEG MPO": jpeg(segment(0xE2, BROKEN_MPO)),
    "JPEG profile": jpeg(segment(0xE2, b"ICC_PROFILE\0\x07\x02abc")),
    "JPEG Photoshop": jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\x00\x00\xff\xff\xff\xff")),
    "JPEG short segments": jpeg(*(segment(0xE0 + n, b"\1") for n in range(16)), segment(0xFE, b"")),
    "JPEG JFIF cut": jpeg(segment(0xE0, b"JFIF\0"), segment(0xEE, b"Adobe")),
    "JPEG comments": jpeg(*[segment(0xFE, b"c" * 60_000)] * 100),
    "JPEG with more behind": jpeg() + b"\0\0\0\x18ftypmp42" + bytes(1000),
    "JPEG cut in a comment at the end": jpeg()[:-2] + segment(0xFE, b"c" * 1000)[:-500],
    "WebP EXIF": webp((b"EXIF", exif(*WRONG_TAGS)), flags=0x08),
    "WebP flags without chunks": webp(flags=0x2C),
    "WebP profile": webp((b"ICCP", b"x" * 1001), (b"XMP ", b"<broken"), (b"ABCD", b"")),
    "WebP cut in EXIF": webp((b"EXIF", b"Exif\0\0" + bytes(1000)))[:-500],
    "GIF comments": gif(*[gif_extension(0xFE, *[b"c" * 255] * 4000)] * 3),
    "GIF applications": gif(gif_extension(0xFF, b"NETSCAPE2.0", b""), gif_extension(0xFF, b"\1"), gif_extension(0x01)),
    "TIFF tags": tiff(*((number, 2, 4, b"72d\0") for number in (270, 282, 283, 296, 305, 34665, 34853, 700))),
    "TIFF tags outside": tiff(*((number, 7, 4000, b"\0\0\0\x7f") for number in (34675, 34377, 33723))),
    "TIFF unknown types": tiff((274, 2, 2, b"6\0"), (60000, 99, 1, b"")),
    "TIFF next directory outside": tiff(base=0x7FFFFFFF),
    "PPM comments": b"P6 #" + b"c" * 100_000 + b"\n# more\n64 48\n255\n" + QUARTERS.tobytes(),
    "PNG in an icon": icon(png(chunk(b"zTXt", b"workflow\0\0" + BOMB))),
    "PNG in a cursor": icon(png(chunk(b"iCCP", b"large\0\0" + BOMB)), kind=2),
    "PNG in an Apple icon": apple_icon((b"TOC ", bytes(8)), (b"ic07", png(chunk(b"iCCP", b"large\0\0" + BOMB)))),
}


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN.keys())
def test_metadata_never_refuses_a_picture_and_costs_little(data):
    """Broken, cut off, wrong or huge: what stands beside the pixels changes nothing."""
    tracemalloc.start()
    try:
        picture = read_picture_file(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data) + 100_000
    assert len(picture.data) < len(data) + 1000
    assert np.abs(middles(decode_picture(data, SIZE)) - middles(QUARTERS)).max() <= 2


ORIENTED = {
    "PNG": png(chunk(b"eXIf", exif(ORIENTATION_6, *WRONG_TAGS))),
    "PNG, packed text": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE))),
    "PNG, text": png(chunk(b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE)),
    "PNG, XMP": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "JPEG": jpeg(segment(0xE1, b"Exif\0\0" + exif(*WRONG_TAGS, ORIENTATION_6))),
    "JPEG, second EXIF": jpeg(segment(0xE1, b"Exif\0\0II"), segment(0xE1, b"Exif\0\0" + exif(ORIENTATION_6))),
    "JPEG, cut after the tag": jpeg(segment(0xE1, b"Exif\0\0" + exif(ORIENTATION_6, *WRONG_TAGS)[:24])),
    "JPEG, long": jpeg(segment(0xE1, b"Exif\0\0" + exif((0x0112, 4, 1, b"\6\0\0\0")))),
    "JPEG, XMP": jpeg(segment(0xE1, XMP_NAME + XMP)),
    "WebP": webp((b"EXIF", exif(ORIENTATION_6)), flags=0x08),
    "WebP, as in JPEG": webp((b"EXIF", b"Exif\0\0" + exif(ORIENTATION_6)), flags=0x08),
    "WebP, XMP": webp((b"XMP ", XMP), flags=0x04),
    "TIFF": tiff(ORIENTATION_6, (282, 2, 4, b"72d\0")),
    "AVIF": saved(IMAGE, "AVIF", exif=b"Exif\0\0" + exif(ORIENTATION_6), quality=100, subsampling="4:4:4"),
}


@pytest.mark.parametrize("data", ORIENTED.values(), ids=ORIENTED.keys())
def test_the_orientation_is_used_wherever_it_stands(data):
    """The orientation is read from among tags that cannot be, and in every format that has one."""
    assert np.abs(middles(decode_picture(data, SIZE)) - TURNED).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation):
    """All eight agree with Pillow's own."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = saved(IMAGE, exif=tags)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).resize((64, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decode_picture(data, SIZE), np.asarray(upright))


def large_png(width: int, height: int) -> bytes:
    return png(width=width, height=height)


def large_webp(width: int, height: int) -> bytes:
    header = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff((b"VP8X", header), (b"VP8L", b"\x2f" + bytes(20)))


def large_gif(width: int, height: int) -> bytes:
    data = bytearray(saved(IMAGE.quantize(4), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def large_jpeg(width: int, height: int) -> bytes:
    return jpeg().replace(struct.pack(">HH", 48, 64), struct.pack(">HH", height, width))


def large_jp2(width: int, height: int) -> bytes:
    """The box says 64x48, the code inside says more."""
    data = bytearray(saved(IMAGE, "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51")
    data[at + 8 : at + 16] = struct.pack(">II", width, height)
    return bytes(data)


def large_avif(width: int, height: int) -> bytes:
    data = saved(IMAGE, "AVIF")
    return data.replace(
        b"ispe\0\0\0\0" + struct.pack(">II", 64, 48), b"ispe\0\0\0\0" + struct.pack(">II", width, height)
    )


def large_in_avif(width: int, height: int) -> bytes:
    """The file says 64x48, the AV1 picture inside says more: its sides have 16 bits each."""
    data = bytearray(saved(IMAGE, "AVIF"))
    at = data.index(b"mdat") + 4
    assert data[at : at + 3] == b"\x12\0\x0a"  # a delimiter, then the sequence header
    header = int.from_bytes(data[at + 4 : at + 4 + data[at + 3]], "big")
    bits = f"{header:0{8 * data[at + 3]}b}"
    assert bits[4] == "1"  # the short header: after ten bits come the sides
    widths, heights = int(bits[10:14], 2) + 1, int(bits[14:18], 2) + 1
    bits = f"{bits[:10]}{15:04b}{15:04b}{width - 1:016b}{height - 1:016b}{bits[18 + widths + heights :]}"
    bits += "0" * (-len(bits) % 8)
    changed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    longer = len(changed) - data[at + 3]
    data[at + 3 : at + 4 + data[at + 3]] = bytes([len(changed)]) + changed
    item = data.index(b"iloc") + 18  # one item of one extent: its place and length
    (length,) = struct.unpack_from(">I", data, item + 4)
    struct.pack_into(">I", data, item + 4, length + longer)
    return bytes(data)


def large_in(kind: str):
    def make(width: int, height: int) -> bytes:
        data = bytearray(saved(IMAGE, kind))
        layout, at = {"BMP": ("<ii", 18), "QOI": (">II", 4), "TGA": ("<HH", 12), "PCX": ("<HH", 8)}[kind]
        data[at : at + 8] = (
            struct.pack(layout, width - (kind == "PCX"), height - (kind == "PCX")) + data[at + 8 : at + 8]
        )
        return bytes(data[: at + struct.calcsize(layout)]) + saved(IMAGE, kind)[at + struct.calcsize(layout) :]

    return make


LARGE = {
    "PNG": large_png,
    "WebP": large_webp,
    "GIF": large_gif,
    "JPEG": large_jpeg,
    "JPEG 2000": large_jp2,
    "AVIF": large_avif,
    "picture in an AVIF": large_in_avif,
    "TIFF": lambda width, height: tiff(side=(width, height)),
    "PPM": lambda width, height: f"P6 {width} {height} 255\n".encode() + bytes(100),
    **{kind: large_in(kind) for kind in ("BMP", "QOI", "TGA", "PCX")},
    "PNG in an icon": lambda width, height: icon(large_png(width, height)),
    "PNG in a cursor": lambda width, height: icon(large_png(width, height), kind=2),
    "bitmap in an icon": lambda width, height: icon(bitmap(width, height)),
    "bitmap in a cursor": lambda width, height: icon(bitmap(width, height), kind=2),
    "PNG in an Apple icon": lambda width, height: apple_icon((b"ic07", large_png(width, height))),
    "JPEG 2000 in an Apple icon": lambda width, height: apple_icon((b"ic07", large_jp2(width, height))),
}


@pytest.fixture
def no_decoding(monkeypatch):
    """Pillow is not even asked."""

    def refuse(*args, **options):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "__init__", refuse)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_limits_act_before_anything_is_decoded(make):
    """Too many pixels, in all or on a side, are refused by the file's own words, wherever they are nested."""
    with pytest.raises(InvalidInit, match=r"13000x13000 pixels are too many.* million") as refused:
        decode_picture(make(13000, 13000), SIZE)
    assert refused.value.field == "first_frame"
    if make(40_000, 48) != make(13000, 13000):
        with pytest.raises(InvalidInit, match=r"40000x48 pixels.* 32768 per side"):
            decode_picture(make(40_000, 48), SIZE)


@pytest.mark.usefixtures("no_decoding")
def test_what_a_file_may_ask_of_its_decoder_is_limited():
    """Tiles larger than the picture, scans without end, samples without number, slow kinds and countless parts."""
    with pytest.raises(InvalidInit, match=r"tiles of 60000x60000 pixels.* 16 million"):
        decode_picture(tiff((322, 4, 1, struct.pack("<I", 60_000)), (323, 4, 1, struct.pack("<I", 60_000))), SIZE)
    progressive = saved(IMAGE, "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    with pytest.raises(InvalidInit, match=r"scans.* 100"):
        decode_picture(progressive[:-2] + scan * 200 + b"\xff\xd9", SIZE)
    for strips in (tiff((273, 4, 2000, struct.pack("<I", 8))), tiff((324, 4, 2000, struct.pack("<I", 8)))):
        with pytest.raises(InvalidInit, match="damaged"):
            decode_picture(strips, SIZE)
    with pytest.raises(InvalidInit, match="damaged"):
        decode_picture(tiff((277, 4, 1, struct.pack("<I", 5000))), SIZE)
    samples = bytearray(saved(IMAGE, "JPEG2000"))
    at = samples.index(b"\xff\x4f\xff\x51")
    samples[at + 40 : at + 42] = b"\x40\0"
    with pytest.raises(InvalidInit, match="damaged"):
        decode_picture(bytes(samples), SIZE)
    for slow in (b"P3 3000 3000 255\n", b"P1 3000 3000\n", LARGE["QOI"](3000, 3000)):
        with pytest.raises(InvalidInit, match=r"3000x3000 pixels are too many.* 2\.5 million"):
            decode_picture(slow, SIZE)
    for many in (png(*[chunk(b"tEXt", b"a\0")] * 70_000), jpeg(*[segment(0xFE, b"")] * 70_000)):
        with pytest.raises(InvalidInit, match="more than 65536 parts"):
            decode_picture(many, SIZE)


@pytest.mark.parametrize("place", [2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_directory_beyond_every_file_is_damage(place):
    """A BigTIFF may name a place that no index can be."""
    with pytest.raises(InvalidInit, match="damaged"):
        decode_picture(struct.pack("<2sHHHQ", b"II", 43, 8, 0, place) + bytes(100), SIZE)


def test_a_tiff_directory_is_read_in_proportion_to_the_file():
    """Tags that all point to the same megabyte do not make it as many megabytes."""
    size = 1_000_000
    tags = ((number, 7, size, struct.pack("<I", 8)) for number in range(40_000, 41_000))
    data = tiff(*tags) + bytes(size)
    tracemalloc.start()
    try:
        pixels = decode_picture(data, SIZE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(pixels, QUARTERS)
    assert peak < 10 * size


def test_an_avif_is_read_in_proportion_to_the_file():
    """An item that is the whole file, thousands of times, is refused before it is put together."""
    data = saved(IMAGE, "AVIF")
    place = data.index(b"iloc") - 4
    (length,) = struct.unpack_from(">I", data, place)
    locations = data[place + 4 : place + 20] + struct.pack(">H", 5000) + struct.pack(">II", 0, 1_000_000) * 5000
    longer = struct.pack(">I", len(locations) + 4) + locations
    meta = data.index(b"meta") - 4
    (meta_length,) = struct.unpack_from(">I", data, meta)
    data = data[:place] + longer + data[place + length :]
    data = data[:meta] + struct.pack(">I", meta_length + len(longer) - length) + data[meta + 4 :] + bytes(1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInit, match="damaged"):
            read_picture_file(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


NOISE = np.random.default_rng(0).integers(0, 65536, (48, 64, 3))


def ppm(kind: int, maximum: int, comment: bytes = b"") -> bytes:
    """Noise, with values up to ``maximum``."""
    values = (NOISE if kind in (3, 6) else NOISE[..., 0]) % (maximum + 1)
    head = b"P%d %s\n64 48\n" % (kind, comment) + (b"" if kind in (1, 4) else b"%d\n" % maximum)
    if kind == 4:
        return head + np.packbits(values.astype(bool), axis=1).tobytes()
    if kind > 4:
        return head + values.astype(np.uint8 if maximum < 256 else ">u2").tobytes()
    return head + (b"" if kind == 1 else b" ").join(b"%d" % value for value in values.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("kind", "maximum"),
    [(1, 1), (4, 1), *((kind, maximum) for kind in (2, 3, 5, 6) for maximum in (1, 100, 255, 256, 1023, 65535))],
)
def test_every_ppm_is_decoded_as_pillow_does(kind, maximum):
    """Text and bytes, of any number of levels: the values are Pillow's, 16-bit grey keeps its upper byte."""
    image = Image.open(io.BytesIO(ppm(kind, maximum)))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    expected = np.asarray(image.convert("RGB").resize((64, 48), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode_picture(ppm(kind, maximum, b"# 7 8 9\n"), SIZE), expected)
    with pytest.raises(InvalidInit, match="damaged"):
        decode_picture(ppm(kind, maximum)[:-30], SIZE)


FILMS = {
    "GIF": saved(IMAGE, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3),
    "WebP": saved(IMAGE, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3, lossless=True),
    "PNG": saved(IMAGE, "PNG", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3),
    "TIFF": saved(IMAGE, "TIFF", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3),
    "MPO": saved(IMAGE, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3, quality=95),
    "AVIF": saved(IMAGE, "AVIF", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3, quality=95),
}


@pytest.mark.parametrize("data", FILMS.values(), ids=FILMS.keys())
def test_of_a_film_the_first_picture_is_decoded(data):
    """Further frames and pages are not looked at."""
    assert np.abs(middles(decode_picture(data, SIZE)) - middles(QUARTERS)).max() <= 6
    if data[:3] not in (b"GIF", b"II*") and b"ftyp" not in data[:12]:
        assert len(read_picture_file(data).data) < len(data)


def test_the_largest_picture_of_an_icon_is_read():
    """Icons and cursors hold several pictures: PNG, bitmaps and, on Apple's, JPEG 2000."""
    small = saved(Image.new("RGB", (16, 16)))
    for kind in (1, 2):
        entries = [struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(small), 38)]
        entries.append(struct.pack("<BBBBHHII", 64, 48, 0, 0, 1, 32, len(png()), 38 + len(small)))
        data = struct.pack("<HHH", 0, kind, 2) + b"".join(entries) + small + png()
        np.testing.assert_array_equal(decode_picture(data, SIZE), QUARTERS)
    upside_down = np.dstack([QUARTERS[::-1, :, ::-1], np.full((48, 64), 255, np.uint8)]).tobytes()
    for kind in (1, 2):
        data = icon(bitmap(64, 48, upside_down + bytes(8 * 48)), kind=kind, sides=(64, 48))
        np.testing.assert_array_equal(decode_picture(data, SIZE), QUARTERS)
    np.testing.assert_array_equal(decode_picture(apple_icon((b"ic11", small), (b"ic07", png())), SIZE), QUARTERS)
    jp2 = saved(IMAGE, "JPEG2000")
    np.testing.assert_array_equal(decode_picture(apple_icon((b"ic11", small), (b"ic07", jp2)), SIZE), QUARTERS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_pictures_are_reduced_before_the_resize(kind, orientation, monkeypatch):
    """A picture above the limit is never converted as a whole, and comes out nearly the same."""
    image = Image.effect_mandelbrot((1200, 800), (-2, -1, 1, 1), 60).convert("RGBA" if kind == "WEBP" else "RGB")
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = saved(image, kind, quality=95, exif=tags)
    size = FrameSize(96, 64)
    exact = decode_picture(data, size).astype(int)
    monkeypatch.setattr(first_frame, "LARGE_PIXELS", 500_000)
    areas = []
    convert = Image.Image.convert

    def watched(self, *args, **options):
        areas.append(self.width * self.height)
        return convert(self, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", watched)
    monkeypatch.setattr(first_frame, "_BAND_PIXELS", 100_000)
    reduced = decode_picture(data, size).astype(int)
    assert all(area <= 100_000 for area in areas)
    assert np.abs(reduced - exact).mean() < 2


async def test_an_ordinary_picture_does_not_wait_for_large_ones(monkeypatch):
    """While a large picture is in work and more wait, ordinary ones are decoded; large ones come one at a time."""
    monkeypatch.setattr(files, "LARGE_PIXELS", 10_000)
    large = saved(Image.new("RGB", (128, 128)))
    release, at_work, most = threading.Event(), [], []
    decode = first_frame._decode

    def held(picture, size):
        if not picture.is_large:
            return decode(picture, size)
        at_work.append(picture)
        most.append(len(at_work))
        release.wait()
        at_work.pop()
        return decode(picture, size)

    monkeypatch.setattr(first_frame, "_decode", held)

    async def load(data: bytes) -> np.ndarray:
        return await load_first_frame(data, SIZE, folder=None, allow_remote=False)

    waiting = [asyncio.create_task(load(large)) for _ in range(6)]
    try:
        for _ in range(3):
            assert (await load(png()))[MIDDLES[0]].tolist() == [220, 20, 20]
        assert not any(task.done() for task in waiting)
        waiting[-1].cancel()
        with suppress(asyncio.CancelledError):
            await waiting[-1]
    finally:
        release.set()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert max(most) == 1
    assert len(most) == 5
    assert [isinstance(result, np.ndarray) for result in done] == [True] * 5 + [False]
