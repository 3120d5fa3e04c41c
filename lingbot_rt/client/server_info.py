"""What a server reports about its model, without a session."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from lingbot_rt.client.address import Proxy, ServerAddress, basic, proxy_for
from lingbot_rt.errors import ConnectFailed, reason_of
from lingbot_rt.shapes import FrameSize

_TIMEOUT_S = 5
_MAX_BYTES = 2**20


def fetch_model_info(url: str, api_key: str | None = None) -> dict[str, Any]:
    """The first entry of /v1/models of the server at ``url`` (http or ws); empty if the server has no such entry.

    Raises ConnectFailed if nothing answers at ``url``.
    """
    server = server_at(url)
    proxy = proxy_for(server)
    way = f" through {proxy}" if proxy else ""
    try:
        answer = _get(server, proxy, f"{server.base}/v1/models", api_key)
    except OSError as error:
        raise ConnectFailed(f"{server.shown} does not answer{way}: {reason_of(error)}", reconnectable=True) from None
    except (http.client.HTTPException, UnicodeError, ValueError):
        raise ConnectFailed(f"{server.shown}{way}: what answers is no HTTP server", reconnectable=False) from None
    try:
        return dict(json.loads(answer)["data"][0])
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return {}


def served_size(url: str, api_key: str | None = None) -> FrameSize | None:
    """The default size of the model that the server at ``url`` serves; None if it does not tell."""
    try:
        return FrameSize.parse(fetch_model_info(url, api_key)["default_size"])
    except (ConnectFailed, KeyError, TypeError, ValueError):
        return None


def server_at(url: str) -> ServerAddress:
    """Raises ConnectFailed for a URL that can name no server."""
    try:
        return ServerAddress.parse(url)
    except ValueError as error:
        raise ConnectFailed(f"url {error}", reconnectable=False) from None


def _get(server: ServerAddress, proxy: Proxy | None, path: str, api_key: str | None) -> bytes:
    """The body of a 200; empty for another status."""
    kind = http.client.HTTPSConnection if server.is_secure else http.client.HTTPConnection
    if proxy is None:
        connection = kind(server.host, server.port, timeout=_TIMEOUT_S)
    else:
        between = urlsplit(proxy.url)
        if between.scheme != "http" or between.hostname is None:
            raise ConnectFailed(
                f"{server.shown}{path} cannot be read through {proxy}: expected an http:// proxy; "
                f"no_proxy={server.host} connects directly",
                reconnectable=False,
            )
        connection = kind(between.hostname, between.port or 80, timeout=_TIMEOUT_S)
        user = between.netloc.rpartition("@")[0]
        connection.set_tunnel(server.host, server.port, headers={"Proxy-Authorization": basic(user)} if user else {})
    try:
        connection.request("GET", path, headers=server.headers(api_key))
        answer = connection.getresponse()
        return answer.read(_MAX_BYTES) if answer.status == http.client.OK else b""
    finally:
        connection.close()
