"""First frames: which pictures are read, and where they may come from."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lingbot_rt.errors import InvalidInit
from lingbot_rt.server import first_frame as module
from lingbot_rt.server import remote_picture
from lingbot_rt.server.first_frame import decode_picture, load_first_frame
from lingbot_rt.server.remote_picture import fetch, is_public
from lingbot_rt.shapes import FrameSize

SIZE = FrameSize(64, 64)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def flat(*colour: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour if len(colour) > 1 else colour[0])


async def load(value: bytes | str, **options) -> np.ndarray:
    return await load_first_frame(value, SIZE, **({"folder": None, "allow_remote": False} | options))


def test_the_resize_is_the_references(golden):
    """A picture of another shape is stretched exactly as the reference does."""
    arrays = np.load(golden("image_condition/image_condition.npz"))
    expected = arrays["resized_rgb"]
    size = FrameSize(expected.shape[1], expected.shape[0])
    got = decode_picture(saved(Image.fromarray(arrays["source_rgb"])), size)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (saved(flat(200, 100, 50)), (200, 100, 50)),
        (saved(flat(200, 100, 50), "JPEG", quality=100), (200, 100, 50)),
        (saved(flat(200, 100, 50), "WEBP", lossless=True), (200, 100, 50)),
        (saved(flat(200, 100, 50), "BMP"), (200, 100, 50)),
        (saved(flat(77, mode="L")), (77, 77, 77)),
        (saved(flat(200, 100, 50, 0, mode="RGBA")), (0, 0, 0)),
        (saved(flat(200, 100, 50, 128, mode="RGBA")), (100, 50, 25)),
        (saved(flat(200, 255, mode="LA")), (200, 200, 200)),
        (saved(flat(200, 100, 50).quantize(), transparency=0), (0, 0, 0)),
        (saved(flat(200, 100, 50).quantize(), transparency=1), (200, 100, 50)),
        (saved(flat(0, 255, 255, 0, mode="CMYK"), "JPEG", quality=100), (255, 0, 0)),
        (saved(Image.fromarray(np.full((64, 64), 0x8040, np.uint16))), (128, 128, 128)),
        (saved(Image.fromarray(np.full((64, 64), 0x8040, np.uint16)), "TIFF"), (128, 128, 128)),
        (saved(Image.fromarray(np.full((64, 64), 99.0, np.float32)), "TIFF"), (99, 99, 99)),
        (saved(flat(1, mode="1")), (255, 255, 255)),
        (saved(flat(9, 8, 7), "GIF", save_all=True, append_images=[flat(200, 0, 0)]), (9, 8, 7)),
    ],
    ids=lambda value: None,
)
def test_every_kind_of_picture_becomes_rgb(data, colour):
    """Grey, palette, alpha (on black), 16 bits, CMYK, floats and the first frame of a film come out as RGB."""
    pixels = decode_picture(data, SIZE)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert np.abs(pixels[32, 32].astype(int) - colour).max() <= 3


def test_a_photograph_stands_upright():
    """EXIF orientation is applied before the resize."""
    image = flat(0, 0, 0, size=(64, 32))
    image.paste((255, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    pixels = decode_picture(saved(image, "PNG", exif=exif), FrameSize(32, 64))
    assert pixels[:30].min() > 200
    assert pixels[34:].max() < 50


@pytest.mark.parametrize("data", [b"", b"no picture", saved(flat(1, 2, 3))[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_refused(data):
    """Empty, other, truncated bytes and formats that would start a program are InvalidInit."""
    with pytest.raises(InvalidInit) as refused:
        decode_picture(data, SIZE)
    assert refused.value.field == "first_frame"


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    """A small file that would unpack to gigabytes is refused by its header."""
    bomb = saved(Image.new("1", (9000, 8000)))
    assert len(bomb) < 50_000
    with pytest.raises(InvalidInit, match="9000x8000 pixels are too many"):
        decode_picture(bomb, SIZE)
    huge = bytearray(saved(Image.new("1", (8, 8))))
    huge[16:24] = (100_000).to_bytes(4, "big") * 2  # the width and height in a PNG's header
    with pytest.raises(InvalidInit):
        decode_picture(bytes(huge), SIZE)


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "TGA", "PCX", "ICO", "ICNS", "JPEG2000", "AVIF", "QOI", "PPM")
GOOD = [saved(flat(1, 2, 3, size=(16, 16)), kind) for kind in KINDS]
GOOD.append(saved(flat(1, 2, 3, size=(16, 16)), "ICO", bitmap_format="bmp").replace(b"\1", b"\2", 1))  # a cursor


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns about broken tags
@settings(max_examples=40)
@given(
    data=st.sampled_from(GOOD),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
)
def test_broken_files_only_raise_invalid_init(data, changes, cut):
    """Whatever is wrong inside a file, the only exception is InvalidInit."""
    broken = bytearray(data)
    for at, value in changes:
        broken[at % len(broken)] = value
    with suppress(InvalidInit):
        assert decode_picture(bytes(broken[: max(len(broken) - cut, 0)]), SIZE).shape == (64, 64, 3)


# --- where it may come from ---


async def test_a_data_url_is_as_good_as_bytes():
    """Base64 and percent encoding are read. A broken URL is refused."""
    data = saved(flat(5, 6, 7))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    np.testing.assert_array_equal(await load(url), decode_picture(data, SIZE))
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    np.testing.assert_array_equal(await load(percent), decode_picture(data, SIZE))
    for broken in ("data:image/png;base64", "data:image/png;base64,@@@", "data:,"):
        with pytest.raises(InvalidInit):
            await load(broken)


async def test_paths_stay_inside_the_folder(tmp_path):
    """A path or link is read only if it ends inside the folder. Links are followed before the check."""
    folder = tmp_path / "frames"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(saved(flat(9, 9, 9)))
    (tmp_path / "outside.png").write_bytes(saved(flat(1, 1, 1)))
    (folder / "inner.png").symlink_to(folder / "sub" / "a.png")
    (folder / "escape.png").symlink_to(tmp_path / "outside.png")
    (folder / "up").symlink_to(tmp_path)
    for good in ("sub/a.png", "./sub/../sub/a.png", "inner.png", str(folder / "sub" / "a.png")):
        assert (await load(good, folder=str(folder)))[0, 0, 0] == 9
    for bad in ("../outside.png", "escape.png", "up/outside.png", str(tmp_path / "outside.png"), "/etc/hostname"):
        with pytest.raises(InvalidInit, match="leads out of"):
            await load(bad, folder=str(folder))
    for missing in ("nothing.png", "sub", "", "a\0b", "x" * 5000):
        with pytest.raises(InvalidInit):
            await load(missing, folder=str(folder))


async def test_without_the_option_the_error_names_it():
    """Paths and URLs are off by default, and the error says which option would allow them."""
    with pytest.raises(InvalidInit, match="--first-frame-dir"):
        await load("picture.png")
    for url in ("http://example.org/a.png", "HTTPS://example.org/a.png"):
        with pytest.raises(InvalidInit, match="--allow-remote-first-frame"):
            await load(url)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
        ),
        *("::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "ff02::1"),
    ],
)
def test_private_addresses_are_refused_in_every_disguise(address):
    """Loopback, private, link-local, shared, multicast, and IPv6 forms that wrap one of them."""
    assert not is_public(ip_address(address))


def test_public_addresses_are_allowed():
    """Public addresses pass, also as an IPv4 address inside IPv6."""
    assert is_public(ip_address("8.8.8.8"))
    assert is_public(ip_address("2606:4700::1111"))
    assert is_public(ip_address("::ffff:8.8.8.8"))


class Pictures(BaseHTTPRequestHandler):
    """A web server with a picture and several ways to misbehave."""

    def do_GET(self) -> None:
        match self.path:
            case "/good.png?a=1":
                self.answer(200, saved(flat(3, 4, 5)))
            case "/moved":
                self.answer(302, b"", location="/good.png?a=1")
            case "/inside":
                self.answer(302, b"", location="http://127.0.0.2:1/")
            case "/file":
                self.answer(302, b"", location="file:///etc/hostname")
            case "/loop":
                self.answer(302, b"", location="/loop")
            case "/large":
                self.answer(200, bytes(3000))
            case "/slow":
                self.send_response(200)
                self.end_headers()
                with self.quietly():
                    for _ in range(100):
                        self.wfile.write(b"x")
                        time.sleep(0.02)
            case _:
                self.answer(404, b"")

    @contextmanager
    def quietly(self) -> Iterator[None]:
        with suppress(OSError):
            yield

    def answer(self, status: int, body: bytes, location: str | None = None) -> None:
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.end_headers()
        with self.quietly():
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def only_this_one(address) -> bool:
    return str(address) == "127.0.0.1"


async def test_a_loopback_url_is_refused_even_when_urls_are_allowed(web):
    """Neither an address nor a name gives access to the server's own network."""
    with pytest.raises(InvalidInit, match="private or local"):
        await load(f"{web}/good.png?a=1", allow_remote=True)
    with pytest.raises(InvalidInit, match="private or local"):
        await load(web.replace("127.0.0.1", "localhost"), allow_remote=True)


def test_a_picture_is_fetched_and_redirects_are_followed(web):
    """A fetch keeps the query string and follows redirects."""
    assert decode_picture(fetch(f"{web}/good.png?a=1", allowed=only_this_one), SIZE)[0, 0, 0] == 3
    assert fetch(f"{web}/moved", allowed=only_this_one) == fetch(f"{web}/good.png?a=1", allowed=only_this_one)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/inside", "private or local"),
        ("/file", "expected an http or https URL"),
        ("/loop", "redirects more than"),
        ("/nothing", "answers 404"),
    ],
)
def test_redirects_pass_the_same_check(web, path, words):
    """A redirect to a refused target, to another scheme, or without end is refused."""
    with pytest.raises(InvalidInit, match=words):
        fetch(web + path, allowed=only_this_one)


def test_size_and_time_are_limited(web, monkeypatch):
    """A body that is too large and one that comes too slowly are refused."""
    monkeypatch.setattr(remote_picture, "MAX_BYTES", 2000)
    with pytest.raises(InvalidInit, match="larger than"):
        fetch(f"{web}/large", allowed=only_this_one)
    with pytest.raises(InvalidInit, match=r"longer than 0\.2 s"):
        fetch(f"{web}/slow", allowed=only_this_one, time_limit_s=0.2)


def test_the_checked_address_is_the_one_connected_to(web, monkeypatch):
    """The name is resolved once, so an answer that changes after the check has no effect."""
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
    port = int(web.rpartition(":")[2])

    find = socket.getaddrinfo

    def resolve(host, port, *args, **options):
        if host != "rebinding.example":
            return find(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    connected = []
    create = socket.create_connection

    def connect(address, **options):
        connected.append(address[0])
        return create((address[0], port), **options)

    monkeypatch.setattr(remote_picture.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote_picture.socket, "create_connection", connect)
    fetch(f"http://rebinding.example:{port}/good.png?a=1", allowed=only_this_one)
    assert connected == ["127.0.0.1"]


def test_formats_that_run_programs_are_never_tried():
    """Pillow would pass PostScript to an interpreter."""
    assert "EPS" not in module._formats()
    assert "PNG" in module._formats()
