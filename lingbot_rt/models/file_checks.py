"""Whether a file of a model is what it seems, and the one-line errors for those that are not."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from lingbot_rt.errors import CheckpointError

_LISTED = 8
_SHOWN = 80
_REMEDIES = {
    errno.EACCES: "give this user the right to read it",
    errno.EPERM: "give this user the right to read it",
    errno.ENOENT: "fetch the model again",
    errno.ENODEV: "copy the model to a file system that can map files into memory",
}
_PLACEHOLDERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull` in the model's folder",
    b"# xet version": "is a Git Xet pointer, not the file itself: run `git xet checkout` in the model's folder",
    b"/annex/objects/": "is a git-annex pointer, not the file itself: run `git annex get` in the model's folder",
    b"<!doctype html": "is a web page, not the file itself: fetch it again from the address that downloads the file",
    b"<html": "is a web page, not the file itself: fetch it again from the address that downloads the file",
}
"""How the content begins -> what stands there in place of the file."""


def broken(message: str) -> CheckpointError:
    """The error for a model that is not loaded. The message becomes one line without control characters."""
    return CheckpointError(escaped(message), field="model_path")


def escaped(text: str) -> str:
    """``text`` with every character that a terminal would not show as itself written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shorten(name) for name in names[:_LISTED]) + more


def shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def system_error(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not give."""
    remedy = _REMEDIES.get(error.errno or 0)
    return broken(f"{path}: {error.strerror or error}" + (f": {remedy}" if remedy else ""))


def require_file(path: Path) -> None:
    """Raises CheckpointError unless ``path`` is a file with content that this process may read."""
    try:
        # Opening a pipe would wait for its writer.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise broken(f"{path} is {kind}, expected a file: put the model's file in its place")
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        if path.is_symlink():
            raise broken(f"{path} is a link to {os.readlink(path)}, which is missing: fetch the model again") from None
        raise broken(f"{path} is missing: fetch the model again") from None
    except OSError as error:
        raise system_error(path, error) from None
    if not start:
        raise broken(f"{path} is empty: fetch it again")
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in _PLACEHOLDERS.items():
        if head.startswith(beginning):
            raise broken(f"{path} {what}")
