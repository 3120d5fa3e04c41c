"""Fetches a first frame over http(s). Clients cannot use it to reach the operator's own network.

The host name is resolved once and all its addresses must be public. The connection goes to an address that was checked,
so a second, different answer of the name server has no effect. Redirects pass the same check.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urljoin, urlsplit

from lingbot_rt.errors import InvalidInit

FIELD = "first_frame"
MAX_BYTES = 20 * 10**6
TIME_LIMIT_S = 10.0
MAX_REDIRECTS = 3

_REDIRECTS = {301, 302, 303, 307, 308}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether ``address`` is globally routable, and not a tunnel to an address that may not be."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None or address in _NAT64:
            return False
    return address.is_global and not address.is_multicast


def fetch(url: str, *, allowed: Callable[[Address], bool] = is_public, time_limit_s: float = TIME_LIMIT_S) -> bytes:
    """The body of ``url``. Blocks. Raises InvalidInit if the target is refused, too large, too slow or not there."""
    deadline = time.monotonic() + time_limit_s
    for _ in range(MAX_REDIRECTS + 1):
        try:
            body, location = _get(url, allowed, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise InvalidInit(f"the URL took longer than {time_limit_s:g} s", field=FIELD) from None
            raise InvalidInit(f"the URL cannot be fetched ({error})", field=FIELD) from None
        if location is None:
            return body
        url = urljoin(url, location)
    raise InvalidInit(f"the URL redirects more than {MAX_REDIRECTS} times", field=FIELD)


def _get(url: str, allowed: Callable[[Address], bool], deadline: float) -> tuple[bytes, str | None]:
    """One request -> (body, None), or (b"", target of the redirect)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInit("expected an http or https URL with a host", field=FIELD)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _resolve(parts.hostname, port, allowed)
    raw = socket.create_connection((str(address), port), timeout=max(deadline - time.monotonic(), 0.001))
    # A server that sends a byte now and then never causes a socket timeout, so the whole exchange has one limit.
    limit = threading.Timer(max(deadline - time.monotonic(), 0), raw.shutdown, [socket.SHUT_RDWR])
    limit.daemon = True
    limit.start()
    try:
        with raw, closing(http.client.HTTPConnection(parts.hostname, port)) as connection:
            connection.sock = (
                ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
                if parts.scheme == "https"
                else raw
            )
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return b"", location
            if response.status != 200:
                raise InvalidInit(f"the URL answers {response.status}", field=FIELD)
            body = response.read(MAX_BYTES + 1)
    finally:
        limit.cancel()
    if len(body) > MAX_BYTES:
        raise InvalidInit(f"the URL's picture is larger than {MAX_BYTES // 10**6} MB", field=FIELD)
    if time.monotonic() >= deadline:
        raise TimeoutError
    return body, None


def _resolve(host: str, port: int, allowed: Callable[[Address], bool]) -> Address:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(allowed(address) for address in addresses):
        raise InvalidInit("the URL leads to a private or local address, which this server refuses", field=FIELD)
    return addresses[0]
