"""Checks who may use the server: the API key and the origin of a request."""

from __future__ import annotations

from collections.abc import Mapping
from hmac import compare_digest
from urllib.parse import urlsplit

from lingbot_rt.config import ServeConfig


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
