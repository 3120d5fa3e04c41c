"""What ``--model-path`` names on this machine. Needs no torch, so that a wrong path is told at once."""

from __future__ import annotations

import os
from pathlib import Path

from lingbot_rt.config import BUILTIN
from lingbot_rt.errors import CheckpointError
from lingbot_rt.hub_cache import newest_snapshot, repository_id
from lingbot_rt.models.file_checks import broken, listed, shorten, system_error
from lingbot_rt.models.folder import PARTS, WEIGHTS

DUMMY = "dummy"
"""The value of --load-format."""

LINGBOT_WORLD_FAST = "lingbot-world-fast"
PUBLISHED = (LINGBOT_WORLD_FAST, "lingbot-world-v2")
"""Names of the published 14B models, which differ in their schedule only."""

BUILTIN_FOLDER = Path(__file__).parent.parent / "builtin"
"""The trained model that the package brings: a checkpoint folder like any other."""

PUBLISHED_FOLDER = Path(__file__).parent.parent / "published"
"""Their configurations. The window is the 18 latent frames, sink 9, of the published figures, not the model's own 45,
sink 3, which takes 57 GB.
"""


def local_folder(model_path: str, *, dummy: bool) -> Path | None:
    """The folder that ``model_path`` names, or None if it may be a hub id. Raises CheckpointError.

    ``dummy``: the folder needs configurations only, and a name of PUBLISHED has one.
    """
    if not model_path.strip():
        raise broken("--model-path is empty: name builtin, a folder or a hub id")
    if model_path == BUILTIN:
        return BUILTIN_FOLDER
    path = Path(os.path.expanduser(model_path))
    try:
        os.listdir(path)
    except FileNotFoundError:
        if model_path in PUBLISHED:
            if dummy:
                return PUBLISHED_FOLDER
            raise broken(
                f"--model-path {model_path}: only the shapes of this model are known, not where its weights are: name "
                "a folder or a hub id, for example OWNER/NAME, or add --load-format dummy for random weights"
            ) from None
        # A hub id has one slash at most, and no part of it begins like a path.
        if path.is_absolute() or model_path.startswith(("./", "../", "~")) or model_path.count("/") > 1:
            shown = path if model_path.startswith("~") else model_path
            raise broken(f"--model-path {shown}: there is no such folder, and a hub id is OWNER/NAME") from None
        return None
    except NotADirectoryError:
        raise broken(f"--model-path {path} is a file, expected the folder of a model") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise broken(f"--model-path {shorten(str(path))}: {reason}") from None
    return path


def require_parts(path: Path, *, dummy: bool) -> None:
    """Raises CheckpointError if ``path`` lacks a part of a model's folder."""
    for part in WEIGHTS if dummy else PARTS:
        try:
            os.listdir(path / part)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_model(path, tuple(WEIGHTS) if dummy else PARTS) from None
        except OSError as error:
            raise system_error(path / part, error) from None


def _no_model(path: Path, parts: tuple[str, ...]) -> CheckpointError:
    """The error for a folder without the parts of a model. It names the folder that was meant, if there is one."""
    repository = path.parent if path.name == "snapshots" else path
    model_id = repository_id(repository)
    try:
        if model_id is not None and (repository / "snapshots").is_dir():
            snapshot = newest_snapshot(repository)
            name = f"{snapshot}, or the id {model_id}" if snapshot else f"one of the folders in {repository}/snapshots"
            return broken(f"{path} is the hub cache's folder of {model_id}, not a model: name {name}")
        inside = [child for child in sorted(path.iterdir()) if all((child / part).is_dir() for part in parts)]
        cached = sorted(filter(None, map(repository_id, (*path.glob("models--*"), *path.glob("hub/models--*")))))
        if cached:
            return broken(f"{path} is a cache of the hub, not a model: name the id of one, of {listed(cached)}")
    except OSError as error:
        return system_error(path, error)
    missing = ", ".join(f"{part}/" for part in parts if not (path / part).is_dir())
    remedy = f"name {inside[0]}" if len(inside) == 1 else "name a folder that has them, or fetch the model again"
    return broken(f"{path} is not a diffusers model folder: it has no {missing}: {remedy}")
