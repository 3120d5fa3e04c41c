"""Checks who may use the server: the API key, the origin and the host name of a request."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import urlsplit

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError


def has_key(config: ServeConfig, headers: Mapping[str, str], query: Mapping[str, str] | None = None) -> bool:
    """Whether the request carries the key, or the server needs none.

    ``query`` is for the WebSockets of browsers, which cannot set headers.
    """
    if config.api_key is None:
        return True
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []
    if query is not None and "api_key" in query:
        given.append(query["api_key"])
    # Every candidate is compared, in constant time.
    return any([compare_digest(key.encode(), config.api_key.encode()) for key in given])  # noqa: C419


def may_connect(config: ServeConfig, headers: Mapping[str, str]) -> bool:
    """Whether a WebSocket with this ``Origin`` is served. The server's own page and requests without one always are."""
    origin = headers.get("origin")
    allowed = config.allowed_origins
    if origin is None or "*" in allowed or origin in allowed:
        return True
    return urlsplit(origin).netloc == headers.get("host")


class KnownHosts:
    """The host names under which this server is reached.

    A page of a foreign name whose address is changed to this server's (DNS rebinding) passes for the server's own page.
    Its ``Host`` header still has the foreign name. An address in ``Host`` cannot be made to point elsewhere.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError when an entry of --allowed-hosts is not a host name."""
        everything = config.allowed_hosts is None and "*" in config.allowed_origins
        given = ["*"] if everything else [name.strip().lower() for name in (config.allowed_hosts or "").split(",")]
        machine = socket.gethostname().lower()
        self._is_open = "*" in given
        self._domains = (".localhost", *(name.removeprefix("*") for name in given if name.startswith((".", "*."))))
        self._names = {"localhost", machine, f"{machine}.local", config.host.lower()}
        self._names |= {urlsplit(origin).hostname or "localhost" for origin in config.allowed_origins}
        for name in given:
            if name and name != "*" and not name.startswith((".", "*.")):
                self._names.add(_required_name(name))

    def knows(self, host: str | None) -> bool:
        """Whether a request with this ``Host`` header is served. Browsers always send one."""
        if self._is_open or host is None:
            return True
        name = _name_in(host)
        return name is not None and (_is_address(name) or name in self._names or name.endswith(self._domains))


def _name_in(host: str) -> str | None:
    """The name or address in a ``Host`` header, in lower case, without port and final dot; None when there is none."""
    if any(character in host for character in "/\\?#@ \t"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises if it is not a number
        return (parts.hostname or "").rstrip(".") or None
    except ValueError:
        return None


def _required_name(entry: str) -> str:
    name = _name_in(entry)
    if name is None:
        raise ConfigError(
            f"--allowed-hosts {entry[:100]!r}: expected a host name such as world.example, without a scheme or path",
            field="allowed_hosts",
        )
    return name


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
