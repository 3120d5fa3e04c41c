"""Fetches a first frame over http(s). Clients cannot use it to reach the operator's own network.

The host name is resolved once and all its addresses must be public. The connection goes to an address that was checked,
so a second, different answer of the name server has no effect. Redirects pass the same check.

One limit of time covers everything: the lookup of the name, connecting, TLS, each read, and all redirects together.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import lingbot_rt
from lingbot_rt.errors import InvalidFirstFrame
from lingbot_rt.server.daemon_pool import DaemonPool
from lingbot_rt.server.public_address import Address, is_public
from lingbot_rt.session.messages import shown

MAX_BYTES = 20 * 10**6
TIME_LIMIT_S = 10.0
MAX_REDIRECTS = 3
MAX_URL_LENGTH = 8192

USER_AGENT = f"lingbot-rt/{lingbot_rt.__version__} (realtime world-model server; Python package lingbot-rt)"
"""Says who asks and where to find out more: some hosts refuse whoever does not."""

_URL_MARKS = "/%:;,=@&+$!*'()~[]|"

_REDIRECTS = {301, 302, 303, 307, 308}

_FETCHES = DaemonPool(4, "remote first frames")
_LOOKUPS = DaemonPool(4, "name lookup")
"""A lookup cannot be interrupted. One that is given up goes on in its thread until the resolver gives up too."""


async def fetch_in_time(url: str) -> bytes:
    """``fetch`` in a thread of its own pool; the limit covers the wait for a free one. Raises InvalidFirstFrame."""
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            return await _FETCHES.run(lambda: fetch(url))
    except TimeoutError:
        raise _too_slow(TIME_LIMIT_S) from None


def fetch(url: str, *, allowed: Callable[[Address], bool] = is_public, time_limit_s: float = TIME_LIMIT_S) -> bytes:
    """The body of ``url``. Blocks, for at most ``time_limit_s`` seconds.

    Raises InvalidFirstFrame if the target is refused, too large, too slow or not there.
    """
    deadline = time.monotonic() + time_limit_s
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        try:
            body, location = _get(parts, allowed, deadline)
        except TimeoutError:
            raise _too_slow(time_limit_s) from None
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or (error.reason or "no answer").replace("_", " ").lower()
            raise InvalidFirstFrame(f"no secure connection to {shown(parts.hostname)} ({reason})") from None
        except OSError as error:
            reason = error.strerror or "the connection broke"
            raise InvalidFirstFrame(f"{shown(parts.hostname)} cannot be reached ({reason})") from None
        except (http.client.HTTPException, ValueError):
            raise InvalidFirstFrame(f"{shown(parts.hostname)} does not answer as a web server does") from None
        if location is None:
            return body
        url = urljoin(url, location)
    raise InvalidFirstFrame(f"the URL redirects more than {MAX_REDIRECTS} times")


def _too_slow(time_limit_s: float) -> InvalidFirstFrame:
    return InvalidFirstFrame(f"the URL took longer than {time_limit_s:g} s, which is the limit")


def _split(url: str) -> SplitResult:
    if len(url) > MAX_URL_LENGTH:
        raise InvalidFirstFrame(f"a URL of {len(url)} characters, at most {MAX_URL_LENGTH} are read")
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        if parts.scheme in ("http", "https") and host and parts.port != 0:
            return parts
    except ValueError:  # a port that is none, broken brackets, an impossible name
        pass
    raise InvalidFirstFrame(f"expected an http or https URL with a host, not {shown(url)}")


def _get(parts: SplitResult, allowed: Callable[[Address], bool], deadline: float) -> tuple[bytes, str | None]:
    """One request -> (body, None), or (b"", target of the redirect)."""
    host, is_secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    with ExitStack() as at_last:
        link = at_last.enter_context(_connect(_resolve(host, port, allowed, deadline), port, deadline))
        if is_secure:
            link = at_last.enter_context(_secured(link, host, deadline))
        connection: Any = http.client.HTTPConnection(host, port)
        connection.default_port = 443 if is_secure else 80  # the header Host leaves it out
        connection.sock = _Link(link, deadline)
        headers = {"Accept": "image/*", "User-Agent": USER_AGENT, "Connection": "close"}
        connection.request("GET", _target(parts), headers=headers)
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in _REDIRECTS and location:
            return b"", location
        if response.status != 200:
            raise InvalidFirstFrame(f"the URL answers {response.status}, expected 200")
        body = b"" if (response.length or 0) > MAX_BYTES else response.read(MAX_BYTES + 1)
        if (response.length or 0) > MAX_BYTES or len(body) > MAX_BYTES:
            raise InvalidFirstFrame(f"the URL's picture is larger than {MAX_BYTES // 10**6} MB, which is the limit")
        return body, None


def _target(parts: SplitResult) -> str:
    """The path and query as they are requested: as they came, with what a request cannot hold escaped."""
    path = quote(parts.path or "/", safe=_URL_MARKS)
    return f"{path}?{quote(parts.query, safe=_URL_MARKS + '?')}" if parts.query else path


def _resolve(host: str, port: int, allowed: Callable[[Address], bool], deadline: float) -> list[Address]:
    lookup = _LOOKUPS.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = lookup.result(_left(deadline))
    finally:
        lookup.cancel()
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(allowed(address) for address in addresses):
        raise InvalidFirstFrame("the URL leads to a private or local address, which this server refuses")
    return addresses


def _connect(addresses: list[Address], port: int, deadline: float) -> socket.socket:
    """A connection to the first address that takes one. A silent one leaves the others their share of the time."""
    failure: OSError = TimeoutError()
    for index, address in enumerate(addresses):
        share_s = _left(deadline) / (len(addresses) - index)
        try:
            return socket.create_connection((str(address), port), timeout=share_s)
        except OSError as error:
            failure = error
    raise failure


def _secured(link: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    with ExitStack() as after_failure:
        secured = _tls().wrap_socket(link, server_hostname=host, do_handshake_on_connect=False)
        after_failure.callback(secured.close)  # ``link`` is detached, so nobody else would
        secured.settimeout(_left(deadline))
        secured.do_handshake()
        after_failure.pop_all()
    return secured


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _left(deadline: float) -> float:
    """Seconds until ``deadline``. Raises TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Link:
    """A connected socket for http.client in which every wait ends at the deadline, however many there are."""

    def __init__(self, link: socket.socket, deadline: float) -> None:
        self._socket = link
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(_left(self._deadline))
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._socket, self._deadline))

    def close(self) -> None:
        """http.client closes its end before it reads the answer. The socket is closed by who opened it."""


class _Reader(io.RawIOBase):
    def __init__(self, link: socket.socket, deadline: float) -> None:
        self._socket = link
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        return self._socket.recv_into(buffer)
