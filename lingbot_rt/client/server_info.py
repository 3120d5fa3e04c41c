"""What a server reports about its model, without a session."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
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
    try:
        status, answer = _ask(server, "/v1/models", api_key)
    except OSError as error:
        way = _way(proxy_for(server))
        raise ConnectFailed(
            f"{server.shown} does not answer{way}: {reason_of(error)}{server.start_hint}", reconnectable=True
        ) from None
    try:
        return dict(json.loads(answer)["data"][0]) if status == http.client.OK else {}
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return {}


def server_answers(url: str) -> bool:
    """Whether a server of this package answers at ``url``, ready or not.

    Raises ConnectFailed for a URL that can name no server, and if something else answers.
    """
    server = server_at(url)
    try:
        _, answer = _ask(server, "/health", None)
    except OSError:
        return False
    try:
        status = json.loads(answer)
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict) or "stage" not in status:
        raise ConnectFailed(f"{server.shown}: what answers there is no lingbot_rt server", reconnectable=False)
    return True


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What an init depends on; nothing of a server that does not tell it."""

    size: FrameSize | None = None  # the model's own
    extensions: frozenset[str] = frozenset()


def served_model(url: str, api_key: str | None = None) -> ServedModel:
    """Of the server at ``url``, also if it does not answer."""
    try:
        entry = fetch_model_info(url, api_key)
    except ConnectFailed:
        return ServedModel()
    names = entry.get("extensions")
    extensions = frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()
    try:
        return ServedModel(FrameSize.parse(entry["default_size"]), extensions)
    except (KeyError, TypeError, ValueError):
        return ServedModel(None, extensions)


def served_size(url: str, api_key: str | None = None) -> FrameSize | None:
    """The default size of the model that the server at ``url`` serves; None if it does not tell."""
    return served_model(url, api_key).size


def server_at(url: str) -> ServerAddress:
    """Raises ConnectFailed for a URL that can name no server."""
    try:
        return ServerAddress.parse(url)
    except ValueError as error:
        raise ConnectFailed(f"url {error}", reconnectable=False) from None


def _ask(server: ServerAddress, path: str, api_key: str | None) -> tuple[int, bytes]:
    """Status and body of a GET below the server's base. Raises OSError, or ConnectFailed if no HTTP server answers."""
    proxy = proxy_for(server)
    try:
        return _get(server, proxy, server.base + path, api_key)
    except OSError:  # some of them are HTTPExceptions too
        raise
    except (http.client.HTTPException, UnicodeError, ValueError):
        raise ConnectFailed(
            f"{server.shown}{_way(proxy)}: what answers is no HTTP server", reconnectable=False
        ) from None


def _way(proxy: Proxy | None) -> str:
    return f" through {proxy}" if proxy else ""


def _get(server: ServerAddress, proxy: Proxy | None, path: str, api_key: str | None) -> tuple[int, bytes]:
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
        return answer.status, answer.read(_MAX_BYTES)
    finally:
        connection.close()
