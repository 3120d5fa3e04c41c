"""Paths of the hub's cache: which repository a snapshot folder belongs to. Reads names only, never the network.

The cache has ``models--OWNER--NAME/snapshots/COMMIT/`` for each revision. ``models--OWNER--NAME/refs/main`` has the
commit that was newest at the last download.
"""

from __future__ import annotations

from pathlib import Path

_PREFIX = "models--"


def repository_folder(model_id: str) -> str:
    """``field/world`` -> ``models--field--world``."""
    return _PREFIX + model_id.replace("/", "--")


def repository_id(folder: Path) -> str | None:
    """``.../models--field--world`` -> ``field/world``; None for any other folder."""
    name = folder.name
    return name.removeprefix(_PREFIX).replace("--", "/") if name.startswith(_PREFIX) and name != _PREFIX else None


def snapshot_id(folder: Path) -> str | None:
    """``.../models--field--world/snapshots/COMMIT`` -> ``field/world``; None for any other folder."""
    return repository_id(folder.parent.parent) if folder.parent.name == "snapshots" else None


def newest_snapshot(repository: Path) -> Path | None:
    """The snapshot that ``refs/main`` of a repository's folder names, else its only one. None without either.

    Raises OSError when the folder cannot be read.
    """
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        commit = ""
    snapshots = repository / "snapshots"
    if commit and (snapshots / Path(commit).name).is_dir():
        return snapshots / Path(commit).name
    found = [path for path in snapshots.iterdir() if path.is_dir()] if snapshots.is_dir() else []
    return found[0] if len(found) == 1 and not commit else None
