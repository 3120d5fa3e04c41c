"""Who may use the server: origins and the API key."""

from __future__ import annotations

from collections.abc import Mapping
from hmac import compare_digest
from urllib.parse import urlsplit

from lingbot_rt.config import ServeConfig


def has_key(config: ServeConfig, headers: Mapping[str, str], query: Mapping[str, str] | None = None) -> bool:
    """Whether the request carries the key, or none is asked for. ``query``: for browsers, which set no headers."""
    if config.api_key is None:
        return True
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []
    if query is not None and "api_key" in query:
        given.append(query["api_key"])
    # Every candidate is compared, in constant time.
    return any([compare_digest(key.encode(), config.api_key.encode()) for key in given])  # noqa: C419


def may_connect(config: ServeConfig, headers: Mapping[str, str]) -> bool:
    """Whether a WebSocket from this ``Origin`` is served. Programs send none; the server's own page always may."""
    origin = headers.get("origin")
    allowed = config.allowed_origins
    if origin is None or "*" in allowed or origin in allowed:
        return True
    return urlsplit(origin).netloc == headers.get("host")
