"""Where a server is: the URL that a user types, the addresses of its WebSocket and HTTP paths, the proxy on the way."""

from __future__ import annotations

import base64
import ipaddress
import urllib.request
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from lingbot_rt.config import ENDPOINT
from lingbot_rt.config_values import environment_value
from lingbot_rt.errors import quoted

_PORTS = {"ws": 80, "wss": 443}
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_BASE_ENDS = (ENDPOINT, "/v1/models", "/v1", "/index.html")
"""Ends of a path that users copy from elsewhere. What stands before them is where the server's paths begin."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The parts of a server's URL."""

    scheme: str  # ws or wss
    host: str  # without brackets
    port: int
    base: str  # path below which the server's paths are: "", or "/world" behind a proxy
    socket_path: str
    query: str
    user: str  # "", or "name:password@" as typed

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """``http://host:port``, with or without the path of a proxy, of ``/v1`` or of the endpoint itself.

        A ws: or wss: URL with any other path is taken as the complete URL of the WebSocket.
        Raises ValueError that shows the URL without its password and says what is expected.
        """
        text = url.strip()
        parts = urlsplit(text if "://" in text else f"http://{text}") if _is_plain(text) else None
        expected = "expected http://HOST:PORT, such as http://127.0.0.1:30000"
        if parts is None or parts.scheme not in _SCHEMES:
            raise ValueError(f"{quoted(hidden(url))}: {expected}")
        scheme = _SCHEMES[parts.scheme]
        try:
            host = parts.hostname or ""
            host.encode("idna")
        except UnicodeError:
            host = ""
        if not host:
            raise ValueError(f"{quoted(hidden(url))}: it names no host; {expected}")
        try:
            port = parts.port if parts.port is not None else _PORTS[scheme]
        except ValueError:
            port = 0
        if port == 0:
            given = parts.netloc.rpartition("]")[2].rpartition(":")[2]
            raise ValueError(f"{quoted(hidden(url))}: port {given}, expected 1 to 65535")
        path = parts.path.rstrip("/")
        end = next((end for end in _BASE_ENDS if path.endswith(end)), "")
        base = path.removesuffix(end)
        socket_path = base + ENDPOINT
        if parts.scheme in _PORTS and path and not end:
            base, socket_path = "", path
        user = parts.netloc.rpartition("@")[0]
        return cls(scheme, host, port, base, socket_path, parts.query, f"{user}@" if user else "")

    @property
    def location(self) -> str:
        """``host`` or ``host:port`` as it stands in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def socket_url(self) -> str:
        """The URL of the WebSocket, with everything that the user typed."""
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{self.user}{self.location}{self.socket_path}{query}"

    @property
    def shown_socket(self) -> str:
        """The same without password and query, which may hold a key."""
        return f"{self.scheme}://{self.location}{self.socket_path}"

    @property
    def shown(self) -> str:
        return self.root + self.base

    @property
    def root(self) -> str:
        """The URL of the server's host without any path."""
        return f"{'https' if self.is_secure else 'http'}://{self.location}"

    @property
    def is_secure(self) -> bool:
        return self.scheme == "wss"

    @property
    def is_local(self) -> bool:
        """Whether it is a loopback address of this machine: never reached through a proxy."""
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None) or address
        return mapped.is_loopback or mapped.is_unspecified

    @property
    def start_hint(self) -> str:
        """What may help when nothing answers on this machine."""
        return "; `lingbot-rt serve` starts a server" if self.is_local else ""

    def headers(self, api_key: str | None) -> dict[str, str]:
        """The authorization of a request: the key, else name and password of the URL."""
        if api_key:
            return {"Authorization": f"Bearer {api_key}"}
        return {"Authorization": basic(self.user[:-1])} if self.user else {}


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy between client and server, and the variable that names it."""

    url: str
    variable: str

    def __str__(self) -> str:
        return f"the proxy {hidden(self.url)} ({self.variable})"


def proxy_for(server: ServerAddress) -> Proxy | None:
    """The proxy that the environment, or the system, names for ``server``. None: connect directly.

    Every connection to a server uses it, so that all of them take the same way.
    """
    if server.is_local or urllib.request.proxy_bypass(f"{server.host}:{server.port}"):
        return None
    known = urllib.request.getproxies()
    schemes = ("wss", "socks", "https", "all") if server.is_secure else ("ws", "socks", "http", "https", "all")
    for scheme in schemes:
        url = known.get(scheme, "").strip()
        if url:
            names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
            name = next((name for name in names if environment_value(name) == url), "the system's settings")
            default = "socks5h" if scheme == "socks" else "http"
            if scheme == "socks" and url.startswith("http://"):
                url = url.removeprefix("http://")
            return Proxy(url if "://" in url else f"{default}://{url}", name)
    return None


def basic(user: str) -> str:
    """``name:password``, percent-encoded as in a URL -> the value of an Authorization header."""
    return "Basic " + base64.b64encode(unquote(user).encode()).decode()


def hidden(url: str) -> str:
    """``url`` without the password and the query, for a message."""
    start, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    place, slash, path = rest.partition("?")[0].partition("/")
    return f"{start}{separator}{place.rpartition('@')[2]}{slash}{path}"


def _is_plain(text: str) -> bool:
    """Whether urlsplit reads the text as it stands: it drops control characters, and raises for an open bracket."""
    if not text.isprintable() or " " in text:
        return False
    try:
        urlsplit(text if "://" in text else f"http://{text}")
    except ValueError:
        return False
    return True
