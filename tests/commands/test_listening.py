"""The sockets of ``serve``: names with several addresses, taken ports, addresses of other machines."""

from __future__ import annotations

import errno
import socket

import pytest

from lingbot_rt.commands import serve
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.fixture
def two_addresses(monkeypatch):
    """localhost is ::1 and 127.0.0.1, as on most desktops."""
    monkeypatch.setattr(serve.socket, "getaddrinfo", lambda *args, **options: [V6, V4])


@needs_ipv6
def test_both_addresses_of_a_name_answer(two_addresses):
    """The server listens on each address with one port, and the banner shows the IPv4 address."""
    with serve.listening_sockets(ServeConfig(host="localhost", port=0)) as listeners:
        port = listeners[0].getsockname()[1]
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as client:
                client.connect((host, port))
        assert serve.shown_address(listeners) == f"127.0.0.1:{port}"


def test_without_ipv6_the_other_address_is_enough(two_addresses, monkeypatch):
    """A machine with IPv6 off serves on 127.0.0.1 alone."""
    real = socket.socket

    class NoIpv6(socket.socket):
        def __init__(self, family: int = -1, *args: object, **options: object) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *args, **options)

    monkeypatch.setattr(serve.socket, "socket", NoIpv6)
    with serve.listening_sockets(ServeConfig(host="localhost", port=0)) as listeners:
        assert [listener.family for listener in listeners] == [socket.AF_INET]
        with real(socket.AF_INET) as client:
            client.connect(listeners[0].getsockname())


@needs_ipv6
def test_a_port_taken_on_one_address_is_an_error(two_addresses):
    """A server that half of the clients reach is no server."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServeConfig(host="localhost", port=port)
        with pytest.raises(ConfigError, match=f"--port {port} .*another --port"), serve.listening_sockets(config):
            pass


def test_all_addresses_are_shown_as_loopback():
    """0.0.0.0 is no address to open; [::1] and 127.0.0.1 are."""
    with serve.listening_sockets(ServeConfig(host="0.0.0.0", port=0)) as listeners:
        assert serve.shown_address(listeners).startswith("127.0.0.1:")


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_of_another_machine(host):
    """The error names --host and gives no advice about the port."""
    config = ServeConfig(host=host, port=0)
    with pytest.raises(ConfigError, match=f"--host {host}: this machine has no such address") as caught:
        serve.listening_sockets(config).__enter__()
    assert "--port" not in str(caught.value)
    assert caught.value.field == "host"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 64])
def test_an_unknown_name(host):
    """A name without an address, or one that can be no name, is told as --host."""
    with pytest.raises(ConfigError, match=f"--host {host}: "):
        serve.listening_sockets(ServeConfig(host=host)).__enter__()


def test_two_servers_cannot_take_one_port():
    """The port is taken from the start, before the model loads."""
    with serve.listening_sockets(ServeConfig(port=0)) as listeners:
        port = listeners[0].getsockname()[1]
        with pytest.raises(ConfigError, match="--port"), serve.listening_sockets(ServeConfig(port=port)):
            pass
