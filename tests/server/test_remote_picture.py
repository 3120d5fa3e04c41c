"""First frames by URL: which addresses are public, and the one limit of time around everything."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest

import lingbot_rt
from lingbot_rt.errors import InvalidInit
from lingbot_rt.server import remote_picture
from lingbot_rt.server.first_frame import load_first_frame
from lingbot_rt.server.public_address import is_public
from lingbot_rt.server.remote_picture import fetch
from tests.server.pictures import QUARTERS, SIZE, png

CERTIFICATE = Path(__file__).with_name("pictures.example.pem")
"""A key and a certificate of pictures.example, signed by itself, made for these tests alone."""

HOST = "pictures.example"
LIMIT_S = 0.5
SOON_S = 60
"""Far more than the limit, and far less than what the servers below would take."""

NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
168.63.129.16 169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.10
192.0.0.170 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1 192.175.48.1 198.18.0.1
198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::2 ::7f00:1 ::8.8.8.8 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:168.63.129.16
::ffff:192.0.0.192 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8 64:ff9b::127.0.0.1 64:ff9b::8.8.8.8 64:ff9b:1::1
64:ff9b:1:ffff::10.0.0.1 100::1 100:0:0:1::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1::1 2001:1::2 2001:1::3
2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1 2001:30::1 2001:1ff::1 2001:db8::1 2002:7f00:1::1
2002:808:808::1 2620:4f:8000::1 3ffe::1 3fff::1 3fff:fff::1 4000::1 5f00::1 8000::1 e000::1 fc00::1 fd00:ec2::254
fe80::1 febf::1 fec0::1 feff::1 ff00::1 ff02::1 ff0e::1 2606:4700::5efe:10.0.0.1 2606:4700::200:5efe:127.0.0.1
"""

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 126.255.255.255 128.0.0.1 168.63.129.15 168.63.129.17
169.253.255.255 169.255.0.1 172.15.255.255 172.32.0.1 192.0.1.1 192.0.3.1 192.167.255.255 192.169.0.1 198.17.255.255
198.20.0.1 203.0.112.255 203.0.114.1 223.255.255.255 ::ffff:8.8.8.8 2000::1 2001:200::1 2001:4860:4860::8888
2003::1 2400:cb00::1 2606:4700::1111 2620:4f:7fff::1 2a00:1450::1 3ffd::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_special_addresses_are_not_public(address):
    """Everything in the registries of special addresses, and every form of one inside another."""
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC.split())
def test_neighbours_of_special_addresses_are_public(address):
    """The borders of the table."""
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"http://{host}/x.png"
            for host in ("127.1", "2130706433", "0x7f.1", "[::ffff:7f00:1]", "[::1]", "0", "[::]")
        ),
        *("http://127.0.0.1:80/", "https://[fe80::1%25eth0]/", "http://169.254.169.254/latest/", "http://192.0.0.192/"),
    ],
)
def test_urls_of_such_addresses_are_refused(url):
    """Also in the spellings that the system's resolver understands."""
    with pytest.raises(InvalidInit, match=r"private or local|cannot be reached|expected an http"):
        fetch(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "https:///x.png",
        "http://a:b/",
        "http://a:0/",
        "http://[::1/",
        "http://a..b/",
        "HTTP:x",
        "http://" + "é" * 80,
    ],
)
def test_what_is_no_url_is_refused_with_its_text(url):
    """Broken hosts and ports."""
    with pytest.raises(InvalidInit, match="expected an http or https URL with a host") as refused:
        fetch(url)
    assert url[:10] in str(refused.value)


def test_a_url_has_a_length():
    """Megabytes of URL are not sent to anybody."""
    with pytest.raises(InvalidInit, match="1000020 characters, at most 8192"):
        fetch("http://example.org/?" + "x" * 1_000_000)


# --- servers ---


@contextmanager
def serving(answer: Callable[[socket.socket, threading.Event], None], *, secure: bool = False) -> Iterator[int]:
    """The port of a server that runs ``answer(connection, stop)`` in a thread for each connection."""
    stop = threading.Event()
    context = None
    if secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), closing(connection):
            link = context.wrap_socket(connection, server_side=True) if context else connection
            with closing(link):
                answer(link, stop)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread in threads:
                thread.join()


def request_of(connection: socket.socket) -> str:
    text = b""
    while b"\r\n\r\n" not in text:
        part = connection.recv(4096)
        if not part:
            break
        text += part
    return text.decode()


def answer_with(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def trickle(begin: bytes) -> Callable[[socket.socket, threading.Event], None]:
    """Sends ``begin``, then a byte now and then for as long as somebody listens."""

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        request_of(connection)
        connection.sendall(begin)
        while not stop.wait(0.02):
            connection.sendall(b"x")

    return answer


def silent(connection: socket.socket, stop: threading.Event) -> None:
    stop.wait()


def no_handshake(connection: socket.socket, stop: threading.Event) -> None:
    """The beginning of a handshake record that never ends."""
    connection.sendall(b"\x16\x03\x03\x3f\x00\x02\x00\x3e\xfc")
    while not stop.wait(0.02):
        connection.sendall(b"x")


@pytest.fixture
def names(monkeypatch) -> dict[str, Callable[[], list[str]]]:
    """What the resolver says: name -> function that gives addresses. HOST is this machine, and its key is trusted."""
    known: dict[str, Callable[[], list[str]]] = {HOST: lambda: ["127.0.0.1"]}
    find = socket.getaddrinfo

    def resolve(host, port, *args, **options):
        if host not in known:
            return find(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]()]

    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    monkeypatch.setattr(remote_picture.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote_picture, "_tls", lambda: context)
    return known


def anywhere(address) -> bool:
    return True


SLOW = {
    "silent": (silent, False),
    "headers": (trickle(b"HTTP/1.1 200 OK\r\nX-Slow: "), False),
    "continue": (trickle(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP"), False),
    "body": (trickle(answer_with(b"", "Content-Length: 100000")), False),
    "chunks": (trickle(answer_with(b"", "Transfer-Encoding: chunked") + b"FFFFF\r\n"), False),
    "https, silent": (silent, False),
    "https, handshake": (no_handshake, False),
    "https, headers": (trickle(b"HTTP/1.1 200 OK\r\nX-Slow: "), True),
    "https, body": (trickle(answer_with(b"", "Content-Length: 100000")), True),
}


@pytest.mark.parametrize(("kind", "server"), SLOW.items(), ids=SLOW.keys())
def test_the_limit_covers_every_step(kind, server, names):
    """Whatever a server delays, also a byte at a time, also behind TLS, the fetch ends and names the limit."""
    answer, secure = server
    began = time.monotonic()
    with serving(answer, secure=secure) as port:
        scheme = "https" if "https" in kind else "http"
        with pytest.raises(InvalidInit, match=r"longer than 0\.5 s"):
            fetch(f"{scheme}://{HOST}:{port}/x.png", allowed=anywhere, time_limit_s=LIMIT_S)
    assert time.monotonic() - began < SOON_S


def test_the_limit_covers_the_lookup(names):
    """A name server that does not answer."""
    release = threading.Event()

    def hang() -> list[str]:
        release.wait()
        return []

    names["hangs.example"] = hang
    try:
        with pytest.raises(InvalidInit, match=r"longer than 0\.5 s"):
            fetch("http://hangs.example/", allowed=anywhere, time_limit_s=LIMIT_S)
    finally:
        release.set()


def test_the_limit_covers_all_redirects_together(names):
    """Each request is quick enough, all together are not."""

    def redirect(connection: socket.socket, stop: threading.Event) -> None:
        request_of(connection)
        stop.wait(0.3)
        connection.sendall(answer_with(b"", "Location: /again", status="302 Found"))

    with serving(redirect) as port, pytest.raises(InvalidInit, match=r"longer than 0\.5 s"):
        fetch(f"http://{HOST}:{port}/", allowed=anywhere, time_limit_s=LIMIT_S)


async def test_slow_urls_delay_nobody_else_and_count_their_wait(names, monkeypatch):
    """More slow URLs than threads: bytes and data: URLs are served meanwhile, and each URL ends within its limit."""
    monkeypatch.setattr(remote_picture, "TIME_LIMIT_S", LIMIT_S)
    release = threading.Event()

    def hang(url: str) -> bytes:
        release.wait()
        return b""

    monkeypatch.setattr(remote_picture, "fetch", hang)

    async def load(value: bytes | str) -> np.ndarray:
        return await load_first_frame(value, SIZE, folder=None, allow_remote=True)

    try:
        slow = [asyncio.create_task(load(f"http://{HOST}/{index}")) for index in range(10)]
        await asyncio.sleep(0)
        np.testing.assert_array_equal(await load(png()), QUARTERS)
        for result in await asyncio.gather(*slow, return_exceptions=True):
            assert isinstance(result, InvalidInit)
            assert "longer than 0.5 s" in str(result)
    finally:
        release.set()


@pytest.mark.parametrize("secure", [False, True])
def test_the_request_is_an_ordinary_clients(names, secure):
    """Host, User-Agent with the version and where to find the project, and the path as browsers send it."""
    requests = []

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        requests.append(request_of(connection))
        connection.sendall(answer_with(png()))

    with serving(answer, secure=secure) as port:
        url = f"{'https' if secure else 'http'}://user:secret@{HOST}:{port}/a b/ü%20c.png?q=ä&r=%41#part"
        assert fetch(url, allowed=anywhere) == png()
    lines = requests[0].split("\r\n")
    assert lines[0] == "GET /a%20b/%C3%BC%20c.png?q=%C3%A4&r=%41 HTTP/1.1"
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    assert headers["Host"] == f"{HOST}:{port}"
    assert re.fullmatch(rf"lingbot-rt/{re.escape(lingbot_rt.__version__)} \(.*\blingbot-rt\)", headers["User-Agent"])
    assert "Authorization" not in headers


def test_a_host_that_wants_a_user_agent_is_read(names):
    """Some hosts answer 403 to who does not say who asks."""

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        known = "\r\nUser-Agent: lingbot-rt/" in request_of(connection)
        connection.sendall(answer_with(png()) if known else answer_with(b"", status="403 Forbidden"))

    with serving(answer) as port:
        assert fetch(f"http://{HOST}:{port}/", allowed=anywhere) == png()


@pytest.mark.parametrize(
    "headers", [("Content-Length: {length}",), ("Transfer-Encoding: chunked",), (), ("Connection: keep-alive",)]
)
@pytest.mark.parametrize("secure", [False, True])
def test_bodies_of_every_kind_are_read(names, headers, secure):
    """With a length, in chunks, or until the end."""
    picture = png()
    body = picture
    if "chunked" in "".join(headers):
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (picture[:50], picture[50:])) + b"0\r\n\r\n"

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        request_of(connection)
        connection.sendall(answer_with(body, *(header.format(length=len(picture)) for header in headers)))

    with serving(answer, secure=secure) as port:
        assert fetch(f"{'https' if secure else 'http'}://{HOST}:{port}/", allowed=anywhere) == picture


def test_a_declared_length_that_is_too_large_is_refused_before_it_is_read(names):
    """The server never sends what it declared, and the refusal does not wait for it."""

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        request_of(connection)
        connection.sendall(answer_with(b"", "Content-Length: 20000001"))
        stop.wait()

    with serving(answer) as port, pytest.raises(InvalidInit, match="larger than 20 MB"):
        fetch(f"http://{HOST}:{port}/", allowed=anywhere)


def test_the_second_address_is_tried_when_the_first_refuses(names):
    """A name with several addresses, of which one works."""

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        request_of(connection)
        connection.sendall(answer_with(png()))

    names["several.example"] = lambda: ["127.0.0.2", "127.0.0.1"]
    with serving(answer) as port:
        assert fetch(f"http://several.example:{port}/", allowed=anywhere) == png()
        with pytest.raises(InvalidInit, match="private or local"):
            fetch(f"http://several.example:{port}/", allowed=lambda address: str(address) != "127.0.0.2")


def test_what_goes_wrong_is_told_with_the_host(names):
    """Nobody listens, another certificate, no TLS, no HTTP, no such name."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        free = unused.getsockname()[1]
    names["other.example"] = names[HOST]

    def garbage(connection: socket.socket, stop: threading.Event) -> None:
        request_of(connection)
        connection.sendall(b"220 mail\r\n\r\n")

    with serving(garbage) as plain, serving(silent, secure=True) as secure:
        for url, words in {
            f"http://{HOST}:{free}/": f"'{HOST}' cannot be reached.*refused",
            f"https://other.example:{secure}/": "no secure connection to 'other.example'",
            f"http://{HOST}:{plain}/": f"'{HOST}' does not answer as a web server does",
        }.items():
            with pytest.raises(InvalidInit, match=words) as refused:
                fetch(url, allowed=anywhere)
            assert "object at" not in str(refused.value)
            assert refused.value.field == "first_frame"

    def no_name() -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    names["missing.example"] = no_name
    with pytest.raises(InvalidInit, match=r"'missing\.example' cannot be reached"):
        fetch("http://missing.example/", allowed=anywhere)
