"""Strings that stand for a first frame: data: URLs as browsers read them, paths, and what is neither."""

from __future__ import annotations

import asyncio
import base64
import threading
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lingbot_rt.errors import InvalidInit
from lingbot_rt.server.first_frame import decode_picture, load_first_frame
from lingbot_rt.server.pictures import kinds, source
from lingbot_rt.server.pictures.data_url import percent_decoded, read_data_url
from tests.server.pictures import IMAGE, QUARTERS, SIZE, png, riff, saved

PNG = png()
BASE64 = base64.b64encode(PNG).decode()
PERCENT = "".join(f"%{byte:02x}" for byte in PNG)


async def load(value: bytes | str, **options) -> np.ndarray:
    return await load_first_frame(value, SIZE, **({"folder": None, "allow_remote": False} | options))


async def refusal(value: bytes | str, **options) -> str:
    """What the client reads."""
    with pytest.raises(InvalidInit) as refused:
        await load(value, **options)
    assert refused.value.field == "first_frame"
    content = refused.value.wire_content
    assert "first_frame" in content
    assert "object at" not in content
    assert len(content) < 600
    assert content.isprintable()
    return content


def padded(length: int) -> str:
    """Base64 of the picture and further bytes, so that ``length`` signs pad it."""
    data = PNG + bytes((-length - len(PNG)) % 3)
    text = base64.b64encode(data).decode()
    assert text.endswith("=" * length)
    return text


LEGAL = {
    "plain": "data:image/png;base64," + BASE64,
    "no padding, one sign": "data:image/png;base64," + padded(1).rstrip("="),
    "no padding, two signs": "data:image/png;base64," + padded(2).rstrip("="),
    "line breaks": "data:image/png;base64," + base64.encodebytes(PNG).decode(),
    "line break at the end": "data:image/png;base64," + BASE64 + "\n",
    "CRLF, tabs and spaces": "data:image/png;base64,\r\n"
    + "\t ".join(BASE64[i : i + 7] for i in range(0, len(BASE64), 7)),
    "spaces before": "\n  data:image/png;base64," + BASE64,
    "escaped letters": "data:image/png;base64," + BASE64.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    "escaped space": "data:image/png;base64,%20%0A" + BASE64[:20] + "%09" + BASE64[20:],
    "no media type": "data:;base64," + BASE64,
    "nothing before the comma": "data:," + PERCENT,
    "only base64": "DATA:;BASE64," + BASE64,
    "another media type": "data:text/plain;charset=utf-8;base64," + BASE64,
    "space before base64": "data:image/png; base64 ," + BASE64,
    "percent": "data:image/png," + PERCENT,
    "percent, large digits": "data:image/png," + PERCENT.upper(),
    "line breaks in percent": "data:image/png," + "\n".join(PERCENT[i : i + 7] for i in range(0, len(PERCENT), 7)),
    "fragment": "data:image/png;base64," + BASE64 + "#part",
    "last bits set": "data:image/png;base64," + padded(2)[:-3] + "B==",
}


@pytest.mark.parametrize("url", LEGAL.values(), ids=LEGAL.keys())
async def test_a_data_url_is_read_as_browsers_read_it(url):
    """With or without padding, white space, escapes, media type and fragment."""
    np.testing.assert_array_equal(await load(url), QUARTERS)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("data:image/png;base64," + BASE64[:40] + "*" + BASE64[40:], "'*' at place 41"),
        ("data:image/png;base64," + BASE64[:40] + "=" + BASE64[40:], "'='"),
        ("data:image/png;base64,iVBORw0KGgo===", "'='"),
        ("data:image/png;base64," + "iVBORw0KGgo_", "'_'"),
        ("data:image/png;base64," + "é" * 8, "at place 1"),
        ("data:image/png;base64,iVBOR", "cut off"),
        ("data:image/png;base64", "comma"),
        ("data:", "comma"),
        ("data:,", "no bytes"),
        ("data:;base64,", "no bytes"),
        ("data:text/html,<html>", "HTML"),
        ("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        ("data:image/png;base64,\U0001f600" + "x" * 100, "place 1"),
    ],
)
async def test_a_broken_data_url_is_refused_with_what_is_wrong(url, word):
    """The letter and its place, the missing comma, or what the URL holds instead of a picture."""
    assert word in await refusal(url)


@given(
    st.lists(st.sampled_from([b"%", b"%4", b"%41", b"%4G", b"A", b"\xff", b"%%", b"%zz"]), max_size=40),
    st.integers(3, 9),
)
def test_percent_escapes_at_every_border(parts, block):
    """Blocks of any length give what the standard says: one escape at a time, from the left."""
    text = b"".join(parts)
    expected, at = bytearray(), 0
    while at < len(text):
        pair = text[at + 1 : at + 3]
        if text[at] == ord("%") and len(pair) == 2 and all(digit in b"0123456789abcdefABCDEF" for digit in pair):
            expected.append(int(pair, 16))
            at += 3
        else:
            expected.append(text[at])
            at += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lingbot_rt.server.pictures.data_url._BLOCK_BYTES", block)
        assert percent_decoded(text) == expected


@pytest.mark.parametrize("body", ["%", "%41", "%4", "A", "\n", "%0", "AAA%"])
@pytest.mark.parametrize("head", ["data:,", "data:;base64,"])
def test_data_urls_take_memory_in_proportion(head, body):
    """No object per sign: a few times the length, whatever the signs are."""
    url = head + body * (6_000_000 // len(body))
    tracemalloc.start()
    try:
        with suppress(InvalidInit):
            read_data_url(url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (BASE64, ["base64", "data:", "bytes"]),
        (BASE64[:60], ["base64"]),
        (base64.encodebytes(PNG).decode(), ["base64"]),
        (base64.urlsafe_b64encode(saved(IMAGE, "JPEG")).decode(), ["base64"]),
        (base64.b64encode(saved(IMAGE, "WEBP")).decode().rstrip("="), ["base64"]),
        (base64.b64encode(bytes(range(256)) * 40).decode(), ["base64"]),
        ("blob:http://127.0.0.1:8000/3e1c", ["blob:", "cannot read"]),
        ("file:///x.png", ["file:", "cannot read"]),
        ("FILE:/x.png", ["file:", "cannot read"]),
        ("s3://bucket/x.png", ["s3:", "cannot read"]),
        ("gs://bucket/x.png", ["gs:", "cannot read"]),
        ("ftp://host/x.png", ["ftp:", "cannot read"]),
        ("content://media/1", ["content:", "cannot read"]),
        ("git+ssh://host/x.png", ["git+ssh:", "cannot read"]),
        ("", ["empty"]),
        (" \n\t", ["empty"]),
        ("x" * 5000 + " y", ["5002 characters"]),
        ("<svg " + "x" * 10_000, ["characters", "'<svg "]),
        ("<svg xmlns='http://www.w3.org/2000/svg'/>", ["no path", "<svg"]),
        ("two\nlines", ["no path"]),
        ("a\0b", ["'a\\x00b'"]),
    ],
)
async def test_a_string_that_can_be_no_path_is_named(value, words, tmp_path):
    """Base64, schemes that the server cannot read, and nothing: the option for paths would not help."""
    for options in ({}, {"folder": str(tmp_path)}):
        content = await refusal(value, **options)
        assert all(word in content for word in words), content
        assert "--first-frame-dir" not in content


@pytest.mark.parametrize(
    "value", ["x.png", "a/b/c", "scenes/street", "C:\\x.png", "über.png", "photo:1.png", "Qk", "x" * 200]
)
async def test_a_string_that_can_be_a_path_names_the_option(value, tmp_path):
    """Without the folder the option is named; with it the file is looked for. The client's own words are shown."""
    content = await refusal(value)
    assert "--first-frame-dir" in content
    assert value[:40].replace("\\", "\\\\") in content
    with_folder = await refusal(value, folder=str(tmp_path))
    assert "no such file" in with_folder
    assert str(tmp_path) not in with_folder


async def test_names_in_the_folder_are_paths_first(tmp_path):
    """A file whose name has a colon or no dot is read."""
    for name in ("photo:1.png", "scenes", "aGVsbG8"):
        (tmp_path / name).write_bytes(PNG)
        np.testing.assert_array_equal(await load(name, folder=str(tmp_path)), QUARTERS)


async def test_the_reason_of_an_unreadable_file_is_told_without_the_servers_path(tmp_path):
    """A name that is too long for the system is told as such."""
    content = await refusal("x" * 300 + ".png", folder=str(tmp_path))
    assert "cannot be read" in content
    assert str(tmp_path) not in content


async def test_a_folder_that_hangs_delays_only_paths(tmp_path, monkeypatch):
    """Reads of the folder wait in threads of their own."""
    release = threading.Event()
    read = source._read_path

    def hang(*args):
        release.wait()
        return read(*args)

    monkeypatch.setattr(source, "_read_path", hang)
    (tmp_path / "a.png").write_bytes(PNG)
    waiting = [asyncio.create_task(load("a.png", folder=str(tmp_path))) for _ in range(6)]
    try:
        for value in (PNG, LEGAL["plain"]):
            np.testing.assert_array_equal(await load(value), QUARTERS)
        assert not any(task.done() for task in waiting)
    finally:
        release.set()
    for pixels in await asyncio.gather(*waiting):
        np.testing.assert_array_equal(pixels, QUARTERS)


NAMED = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "HEIC (HEIF)": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "SVG, declared": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg:svg width="1">',
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "HTML, short": b"\n\n <HTML><head>",
    "XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON": b'{"error": "not found"}',
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "git-annex pointer": b"/annex/objects/SHA256E-s1--ab.jpg\n",
    "PDF": b"%PDF-1.7\n\xe2\xe3",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "MP4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(100),
    "QuickTime": b"\0\0\0\x14ftypqt  " + bytes(100),
    "WebM": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01" + bytes(100),
    "AVI": b"RIFF\0\1\0\0AVI LIST" + bytes(100),
    "MPEG": b"\0\0\1\xba" + bytes(100),
    "sound": b"RIFF\0\1\0\0WAVEfmt " + bytes(100),
    "JPEG XL": b"\xff\x0a" + bytes(100),
    "Photoshop": b"8BPS\0\1" + bytes(100),
    "ZIP": b"PK\3\4" + bytes(100),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "base64 text": BASE64.encode(),
    "data: URL": LEGAL["plain"].encode(),
    "address": b"https://example.org/a.png",
    "text that begins with 'Not a picture": b"Not a picture\n",
    "text that begins with 'Grüße'": "Grüße".encode("utf-16"),
    "zeros": bytes(1000),
    "no bytes": b"",
    "unknown kind (they begin with 9d 00 ff": b"\x9d\0\xff\1\2\3\4\5\6" * 40,
}


@pytest.mark.parametrize(("name", "data"), NAMED.items(), ids=NAMED.keys())
async def test_what_is_no_picture_is_named_with_what_is_read(name, data):
    """What was sent, by its usual name, and the formats that would be read."""
    content = await refusal(data)
    assert name.partition(",")[0].partition(" (HEIF)")[0] in content
    assert all(form in content for form in ("PNG", "JPEG", "WebP"))


async def test_formats_that_pillow_lacks_are_named_and_not_offered(monkeypatch):
    """Without support in Pillow, AVIF and WebP are named, and missing from what is read."""
    avif = saved(IMAGE, "AVIF")
    monkeypatch.setattr(kinds.features, "get_supported", lambda: ["jpg"])
    kinds.formats.cache_clear()
    try:
        for name, data in {"AVIF": avif, "WebP": saved(IMAGE, "WEBP")}.items():
            content = await refusal(data)
            assert f"{name} picture" in content
            assert name not in content.partition("expected")[2]
        brands = avif[:8] + b"mif1" + avif[12:]
        assert "AVIF picture" in await refusal(brands)
    finally:
        kinds.formats.cache_clear()


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "TGA", "PCX", "ICO", "JPEG2000", "AVIF", "QOI"]
)
async def test_a_cut_off_picture_names_its_format(kind):
    """The format and what is wrong, in the server's own words."""
    data = saved(Image.effect_noise((64, 48), 90).convert("RGB"), kind)
    content = await refusal(data[: len(data) // 2])
    assert {"WEBP": "WebP", "JPEG2000": "JPEG 2000", "ICO": ""}.get(kind, kind) in content
    assert "damaged" in content


async def test_a_wave_is_no_picture_and_an_empty_webp_is_damaged():
    """Containers that pictures share with other things."""
    assert "WebP" in await refusal(riff())


def test_programs_are_never_started(monkeypatch):
    """Pillow would pass PostScript to an interpreter."""
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *args, **options: started.append(args))
    with pytest.raises(InvalidInit, match="PostScript"):
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", SIZE)
    assert not started
