"""The form of a value, by its kind, wherever it comes from: a flag, an environment variable, a file or an argument.

Each ``*_value`` function takes a text and returns the form that works, or raises ValueError. Its message shows the
value and says what is expected; the caller puts the name of the option before it. A key is never shown.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lingbot_rt.errors import quoted

_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NOT_SENT = ("ws", "wss", "file", "data", "blob")  # schemes that no Origin header has; a page of file: sends "null"


def environment_value(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable ``name`` without surrounding white space. None when it is unset, empty or white space only."""
    return environment.get(name, "").strip() or None


def flag(name: str) -> str:
    """``model_path`` -> ``--model-path``."""
    return "--" + name.replace("_", "-")


def text_value(text: str) -> str:
    """``text`` without surrounding white space. It must not be empty nor hold control characters."""
    stripped = text.strip()
    if not stripped:
        raise ValueError(f"{quoted(text)}: expected a value that is not empty")
    if any(ord(char) < 32 or ord(char) == 127 for char in stripped):
        raise ValueError(f"{quoted(text)}: expected a value without control characters")
    return stripped


def lower_value(text: str) -> str:
    """A word whose case does not matter."""
    return text_value(text).lower()


def path_value(text: str) -> str:
    """A path. ``~`` and ``~user`` at its start become the home folder, as a shell would do."""
    path = text_value(text)
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{quoted(text)}: expected a path, but the home folder is not known") from None


def key_value(text: str) -> str:
    """An API key that a client can send in a header: printable ASCII."""
    key = text.strip()
    if not key:
        raise ValueError("(not shown): expected a key, got an empty text")
    wrong = next((place for place, char in enumerate(key, 1) if not " " <= char <= "~"), None)
    if wrong is not None:
        raise ValueError(
            f"(not shown): expected printable ASCII characters, because clients send it in a header; "
            f"character {wrong} of {len(key)} is none"
        )
    return key


def host_value(text: str) -> str:
    """An address or a name to listen on. The brackets of an IPv6 address are removed."""
    host = text_value(text)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    if not re.fullmatch(r"[\w.%:-]+", bare) or (":" in bare and "%" not in bare):
        raise ValueError(
            f"{quoted(text)}: expected a name or address without scheme and port, such as 127.0.0.1, localhost or "
            "0.0.0.0 for all addresses"
        )
    return bare


def origins_value(text: str) -> str:
    """A comma-separated list of origins, each as browsers send it. ``*`` is all, ``none`` is no other origin."""
    entries = [entry.strip() for entry in text_value(text).split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"{quoted(text)}: expected origins, * or none")
    if "none" in entries and len(entries) > 1:
        raise ValueError(f"{quoted(text)}: none stands alone")
    return ",".join(dict.fromkeys(entry if entry in ("*", "none", "null") else _origin(entry) for entry in entries))


def _origin(entry: str) -> str:
    """``HTTPS://World.Example:443/`` -> ``https://world.example``."""
    wrong = ValueError(
        f"{quoted(entry)}: expected origins as browsers send them, SCHEME://HOST or SCHEME://HOST:PORT without a path, "
        "such as https://world.example, separated by commas"
    )
    scheme, separator, rest = entry.partition("://")
    scheme = scheme.lower()
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname or "", parts.port
        if parts.netloc.rpartition("]")[2].endswith(":"):
            raise wrong
        host = f"[{ipaddress.IPv6Address(host)}]" if ":" in host else host.encode("idna").decode()
    except ValueError:
        raise wrong from None
    if (
        not separator
        or not _SCHEME.fullmatch(scheme)
        or scheme in _NOT_SENT
        or "@" in parts.netloc
        or parts.path not in ("", "/")
        or not rest.rstrip("/") == parts.netloc
        or not (host.startswith("[") or _HOST_NAME.fullmatch(host))
    ):
        raise wrong
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{scheme}://{host}:{port}"
