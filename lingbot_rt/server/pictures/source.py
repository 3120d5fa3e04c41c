"""Where a first frame that an init gives as a string comes from: a data: URL, a file in one folder, or a public URL."""

from __future__ import annotations

import re
from pathlib import Path

from lingbot_rt.errors import InvalidFirstFrame
from lingbot_rt.server.daemon_pool import DaemonPool
from lingbot_rt.server.pictures.data_url import read_data_url
from lingbot_rt.server.pictures.kinds import looks_like_base64
from lingbot_rt.server.remote_picture import fetch_in_time
from lingbot_rt.session.messages import shown

MAX_FILE_BYTES = 64 * 2**20

_SPACE = "".join(map(chr, range(0x21)))
"""What browsers strip from both ends of a URL."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}):")
_NO_PATHS = {"about", "blob", "chrome", "cid", "content", "file", "filesystem", "javascript", "moz-extension", "urn"}
"""Schemes that stand without // too. A colon alone does not make a URL of a path."""

_DATA_URLS = DaemonPool(1, "data URLs")
_FILES = DaemonPool(2, "first frames of the folder")
"""Apart from the rest: a folder may be on a disk that hangs."""

_MAX_PATH = 4096
_NO_PATH = re.compile(r"[\0\r\n]|^\s*(?:<|[{\[]\s*[\"{\[])")
"""Several lines, or the beginning of a document."""

_WAYS = "send the picture's bytes or a data: URL"


async def read_source(value: str, folder: str | None, allow_remote: bool) -> bytes:
    """The bytes that ``value`` names. Raises InvalidFirstFrame."""
    scheme = _scheme(value)
    if scheme == "data":
        return await _DATA_URLS.run(lambda: read_data_url(value.strip(_SPACE)))
    if scheme in ("http", "https"):
        if not allow_remote:
            raise InvalidFirstFrame(f"this server takes no URLs (--allow-remote-first-frame), {_WAYS}")
        return await fetch_in_time(value.strip(_SPACE))
    return await _FILES.run(lambda: _read_path(value, scheme, folder))


def _scheme(value: str) -> str:
    """The scheme of a string that begins like a URL, in small letters, or nothing."""
    found = _SCHEME.match(value[:4096].lstrip(_SPACE))
    return found[1].lower() if found else ""


def _check_is_path(value: str, scheme: str) -> None:
    if not value.strip():
        raise InvalidFirstFrame(f"an empty string, {_WAYS}")
    if scheme in _NO_PATHS or re.match(r"\s*[A-Za-z0-9+.-]{2,32}://", value[:_MAX_PATH]):
        raise InvalidFirstFrame(f"{shown(value[:60])}: the server cannot read {scheme}: addresses, {_WAYS}")
    if looks_like_base64(value):
        raise InvalidFirstFrame(
            f"a string of {len(value)} characters that looks like base64, "
            "expected data:image/png;base64, before it, or the picture's bytes"
        )
    if len(value) > _MAX_PATH or _NO_PATH.search(value):
        raise InvalidFirstFrame(f"a string of {len(value)} characters ({shown(value[:40])}) is no path, {_WAYS}")


def _read_path(value: str, scheme: str, folder: str | None) -> bytes:
    _check_is_path(value, scheme)
    if folder is None:
        raise InvalidFirstFrame(
            f"{shown(value)} would be a path, and this server takes none (--first-frame-dir FOLDER), {_WAYS}"
        )
    root = Path(folder).resolve()
    try:
        path = (root / value).resolve()  # follows links, so the path that is checked is the one that is read
        if not path.is_relative_to(root):
            raise InvalidFirstFrame(f"{shown(value)} leads out of --first-frame-dir, expected a path inside it")
        if not path.is_file():
            raise InvalidFirstFrame(f"{shown(value)}: there is no such file in --first-frame-dir")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidFirstFrame(f"{shown(value)} is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # unreadable, a name that cannot be one, a loop of links
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise InvalidFirstFrame(f"{shown(value)} in --first-frame-dir cannot be read ({reason})") from None
