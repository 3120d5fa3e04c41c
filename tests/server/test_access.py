"""Under which names the server answers, and what a foreign page can reach."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.errors import ConfigError
from lingbot_rt.server import access
from lingbot_rt.server.access import KnownHosts
from tests.server.conftest import LIMIT_S

NARROW = {"cors_allow_origins": "https://good.example"}


async def status_of(server, path: str, **headers: str) -> int:
    async with httpx.AsyncClient(base_url=server.http, timeout=LIMIT_S, verify=False) as client:
        return (await client.get(path, headers=headers)).status_code


async def handshake(server, host: str) -> bytes:
    """The beginning of the answer to a WebSocket of the page at http://``host``/."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    upgrade = f"Upgrade: websocket\r\nConnection: Upgrade\r\nOrigin: http://{host}\r\n{key}\r\n"
    writer.write(f"GET {ENDPOINT} HTTP/1.1\r\nHost: {host}\r\n{upgrade}".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    body = b"" if b" 101 " in head else await reader.read()
    writer.close()
    return head + body


async def test_a_page_whose_name_was_bound_to_this_server_gets_nothing(serve):
    """Host = Origin = a foreign name: neither the WebSocket nor HTTP answers, and the refusal names the option."""
    server = await serve(**NARROW)
    evil = f"evil.example:{server.port}"
    answer = await handshake(server, evil)
    assert b" 403 " in answer.split(b"\r\n")[0]
    assert b"--allowed-hosts" in answer
    for path in ("/v1/models", "/health", "/", "/nothing"):
        assert await status_of(server, path, Host=evil) == 403


async def test_names_of_this_server_are_served(serve):
    """Addresses, localhost, this machine's name, the configured names and the hosts of allowed origins, on HTTP and
    WebSocket."""
    server = await serve(**NARROW, allowed_hosts="world.example, .lab.example")
    names = ["127.0.0.1", "192.168.1.5", "[::1]", "localhost", socket.gethostname(), "good.example", "world.example"]
    for name in [*names, "a.lab.example", "LOCALHOST", "world.example."]:
        for host in (name, f"{name}:{server.port}"):
            assert await status_of(server, "/v1/models", Host=host) == 200, host
    assert b" 101 " in await handshake(server, "world.example")


@pytest.mark.parametrize(
    ("options", "host", "known"),
    [
        ({}, "anything.example", True),  # every page may connect: a name protects nothing
        ({"allowed_hosts": "world.example"}, "anything.example", False),
        ({"allowed_hosts": "*", **NARROW}, "anything.example", True),
        (NARROW, None, True),
        (NARROW, "", False),
        (NARROW, "127.0.0.1.evil.example", False),
        (NARROW, "localhost.evil.example", False),
        (NARROW, "evil.example#localhost", False),
        (NARROW, "evil.example@localhost", False),
        (NARROW, "localhost:evil", False),
        (NARROW, "[::1", False),
        (NARROW, "good.example.", True),
        ({"host": "world.lan", **NARROW}, "world.lan:30000", True),
        ({"allowed_hosts": "*.lab.example"}, "lab.example", False),
        ({"allowed_hosts": "*.lab.example"}, "evillab.example", False),
        ({"allowed_hosts": "World.Example:8443"}, "world.example", True),
    ],
)
def test_which_hosts_are_known(options, host, known):
    assert KnownHosts(ServeConfig(**options)).knows(host) is known


@pytest.mark.parametrize("entry", ["https://world.example", "world.example/x", "a b"])
def test_an_entry_that_is_no_host_is_refused_at_the_start(entry):
    """The message names the option and the entry."""
    with pytest.raises(ConfigError, match="--allowed-hosts") as refused:
        KnownHosts(ServeConfig(allowed_hosts=f"good.example,{entry}"))
    assert entry in str(refused.value)
    assert refused.value.field == "allowed_hosts"


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Header and query are both compared, also after one that fits, and by hmac alone."""
    compared = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return given == b"right"

    monkeypatch.setattr(access, "compare_digest", compare)
    config = ServeConfig(api_key="key")
    assert access.has_key(config, {"authorization": "Bearer right"}, {"api_key": "wrong"})
    assert compared == [(b"right", b"key"), (b"wrong", b"key")]
    assert not access.has_key(config, {"authorization": "Bearer key"}, {"api_key": "key"})
