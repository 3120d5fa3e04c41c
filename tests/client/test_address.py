"""URLs of servers, proxies on the way, and what is said when something between client and server refuses."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from lingbot_rt.client import ConnectFailed, connect
from lingbot_rt.client.address import ServerAddress, proxy_for
from lingbot_rt.client.server_info import fetch_model_info
from tests.client.test_connect import INIT, serving, two_chunks

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "socks_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch):
    """The tests' own variables are the only ones."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def tunnel(target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that answers CONNECT and passes bytes to the local port ``target``, whatever host was asked for.

    Yields its port and the first lines of the requests.
    """
    asked: list[bytes] = []
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *values: socket.socket) -> None:
        threads.append(threading.Thread(target=work, args=values))
        threads[-1].start()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client = sockets.enter_context(listener.accept()[0])
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += client.recv(65536)
                    asked.append(request.split(b"\r\n")[0])
                    server = sockets.enter_context(socket.create_connection(("127.0.0.1", target)))
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    start(copy, client, server)
                    start(copy, server, client)

        start(serve)
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("127.0.0.1:30000", "ws://127.0.0.1:30000/v1/realtime_video/generate"),
        ("http://host:1/", "ws://host:1/v1/realtime_video/generate"),
        ("https://host", "wss://host/v1/realtime_video/generate"),
        ("ws://host/v1/realtime_video/generate", "ws://host/v1/realtime_video/generate"),
        ("ws://host/elsewhere", "ws://host/elsewhere"),
        ("http://host:1/v1", "ws://host:1/v1/realtime_video/generate"),
        ("http://host:1/v1/models", "ws://host:1/v1/realtime_video/generate"),
        ("https://world.example/world/", "wss://world.example/world/v1/realtime_video/generate"),
        ("https://world.example/world/index.html", "wss://world.example/world/v1/realtime_video/generate"),
        ("http://[::1]:30000", "ws://[::1]:30000/v1/realtime_video/generate"),
        (" HTTP://Host:80/#top", "ws://host/v1/realtime_video/generate"),
        ("wss://host?api_key=a", "wss://host/v1/realtime_video/generate?api_key=a"),
        ("https://name:word@host", "wss://name:word@host/v1/realtime_video/generate"),
    ],
)
def test_urls(url, endpoint):
    """A server's address is enough, also below a path. A ws: URL with another path stays as it is."""
    assert ServerAddress.parse(url).socket_url == endpoint


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://127.0.0.1:99999", "99999, expected 1 to 65535"),
        ("http://127.0.0.1:0", "1 to 65535"),
        ("http://127.0.0.1:port", "1 to 65535"),
        ("http://[::1", "http://HOST:PORT"),
        ("ftp://host", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("", "http://HOST:PORT"),
        ("http://ho st", "http://HOST:PORT"),
        ("http://ho\nst", "http://HOST:PORT"),
        (f"http://{'a' * 64}.example", "http://HOST:PORT"),
    ],
)
def test_wrong_urls_say_what_is_expected(url, named):
    """A URL that can name no server is refused before anything is sent."""
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        ServerAddress.parse(url)
    assert "\n" not in str(caught.value)


def test_urls_are_shown_without_their_secrets():
    """Passwords and keys of a URL are in no message."""
    server = ServerAddress.parse("https://name:secret@host/v1/realtime_video/generate?api_key=secret")
    with pytest.raises(ValueError, match="70000") as caught:
        ServerAddress.parse("https://name:secret@host:70000/?api_key=secret")
    assert "secret" not in server.shown + server.shown_socket + str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "world.localhost", "[::1]"])
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "ALL_PROXY"])
def test_loopback_goes_direct(host, variable, monkeypatch):
    """A server on this machine is never asked for through a proxy."""
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert proxy_for(ServerAddress.parse(f"http://{host}:30000")) is None


@pytest.mark.parametrize(
    ("url", "variable", "value", "shown"),
    [
        ("http://world.example", "http_proxy", "http://127.0.0.1:9", "http://127.0.0.1:9 (http_proxy)"),
        ("http://world.example", "HTTPS_PROXY", "http://127.0.0.1:9", "http://127.0.0.1:9 (HTTPS_PROXY)"),
        ("https://world.example", "https_proxy", "127.0.0.1:9", "http://127.0.0.1:9 (https_proxy)"),
        ("https://world.example", "ALL_PROXY", "socks5://name:secret@127.0.0.1:9", "socks5://127.0.0.1:9 (ALL_PROXY)"),
    ],
)
def test_other_hosts_go_through_the_proxy(url, variable, value, shown, monkeypatch):
    """The proxy is shown with the variable that names it, and without its password."""
    monkeypatch.setenv(variable, value)
    assert str(proxy_for(ServerAddress.parse(url))) == f"the proxy {shown}"
    monkeypatch.setenv("no_proxy", "world.example")
    assert proxy_for(ServerAddress.parse(url)) is None


def test_empty_proxy_variables_count_as_unset(monkeypatch):
    """A variable without a value names no proxy."""
    monkeypatch.setenv("http_proxy", "")
    monkeypatch.setenv("https_proxy", " ")
    assert proxy_for(ServerAddress.parse("http://world.example")) is None


def test_a_session_on_this_machine_with_a_dead_proxy(monkeypatch):
    """The session runs although the variable names a proxy that does not answer."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(two_chunks) as url, connect(url, **INIT) as world:
        assert next(world).index == 0


async def test_a_dead_proxy_is_named(monkeypatch):
    """Session and model information name the proxy's address and its variable."""
    proxy = f"127.0.0.1:{closed_port()}"
    monkeypatch.setenv("http_proxy", f"http://{proxy}")
    url = "http://world.invalid:30000"
    with pytest.raises(ConnectFailed, match="http_proxy") as blocking, connect(url, **INIT):
        pass
    with pytest.raises(ConnectFailed, match="http_proxy") as asynchronous:
        async with connect(url, **INIT):
            pass
    with pytest.raises(ConnectFailed, match="http_proxy") as info:
        fetch_model_info(url)
    assert all(proxy in str(caught.value) for caught in (blocking, asynchronous, info))


def test_all_connections_take_the_proxy(monkeypatch):
    """The session and the request for /v1/models ask the same proxy for the same host."""
    with serving(two_chunks) as url, tunnel(int(url.rpartition(":")[2])) as (port, asked):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with connect("http://world.invalid:30000", **INIT) as world:
            assert next(world).index == 0
        assert fetch_model_info("http://world.invalid:30000") == {}
    assert [line.split()[:2] for line in asked] == [
        [b"CONNECT", b"world.invalid:30000"]
    ] * 3  # the init depends on what the server has


def test_a_socks_proxy_without_its_package_is_named(monkeypatch):
    """The error names the variable and the package."""
    monkeypatch.setitem(__import__("sys").modules, "python_socks", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(ConnectFailed, match=r"ALL_PROXY.*python-socks"), connect("http://world.invalid", **INIT):
        pass
    with pytest.raises(ConnectFailed, match="ALL_PROXY"):
        fetch_model_info("http://world.invalid")


@pytest.mark.parametrize("status", [403, 404])
def test_a_wrong_path_is_told_from_a_wrong_key(status):
    """A refused handshake on another path than the endpoint's speaks of the path, on the endpoint itself of the key."""

    def refuse(connection, request):
        return connection.respond(status, "no")

    with serving(two_chunks, process_request=refuse) as url:
        with pytest.raises(ConnectFailed, match="/v1/realtime_video/generate") as caught:
            connect(url.replace("http", "ws") + "/nope", **INIT).__enter__()
        assert "api_key" not in str(caught.value)
        with pytest.raises(ConnectFailed, match=f"{url}") as caught:
            connect(f"{url}/nope", **INIT).__enter__()
        assert "api_key" not in str(caught.value)
        with pytest.raises(ConnectFailed) as caught:
            connect(url, **INIT).__enter__()
        assert ("api_key" in str(caught.value)) == (status == 403)


def test_something_that_is_no_http_server():
    """An answer that is not HTTP is one named error, for the session and for the model information."""

    def greet(listener: socket.socket) -> None:
        for _ in range(3):
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(b"SSH-2.0-OpenSSH\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectFailed, match="no HTTP server"):
            fetch_model_info(url)
        with (
            pytest.raises(
                ConnectFailed, match="does not answer as a WebSocket: expected the address of `lingbot-rt serve`"
            ),
            connect(url, **INIT),
        ):
            pass
        thread.join()


def test_a_key_that_no_header_can_carry():
    """A key that ends in a line break is sent without it; one that holds a line break is refused and not shown."""
    keys = []

    def remember(connection, request):
        keys.append(request.headers["Authorization"])

    with serving(two_chunks, process_request=remember) as url, connect(url, api_key="secret\r\n", **INIT) as world:
        next(world)
    assert set(keys) == {"Bearer secret"}
    with pytest.raises(ConnectFailed, match="api_key") as caught:
        connect("http://127.0.0.1:1", api_key="sec\nret", **INIT)
    assert "sec" not in str(caught.value)
