"""What a server reports about its model, without a session."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from lingbot_rt.errors import ConnectFailed

_TIMEOUT_S = 5


def fetch_model_info(url: str, api_key: str | None = None) -> dict[str, Any]:
    """The first entry of /v1/models of the server at ``url`` (http or ws); empty if the server has no such entry.

    Raises ConnectFailed if nothing answers at ``url``.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    scheme = "https" if parts.scheme in ("https", "wss") else "http"
    request = urllib.request.Request(f"{scheme}://{parts.netloc}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return dict(json.load(answer)["data"][0])
    except urllib.error.HTTPError:
        return {}
    except OSError as error:
        raise ConnectFailed(f"{url} does not answer: {error}", reconnectable=True) from None
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
