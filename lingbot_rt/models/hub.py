"""A model of the Hugging Face hub -> a folder of the hub's cache that has every file the loader reads, and no other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lingbot_rt.errors import CheckpointError, one_line
from lingbot_rt.hub_cache import newest_snapshot, repository_folder
from lingbot_rt.models.file_checks import broken, listed, system_error
from lingbot_rt.models.folder import (
    CONFIGS,
    SMALL_FILES,
    TOKENIZER,
    TOKENIZER_FILES,
    TOKENIZER_MODEL,
    WEIGHTS,
    weight_names,
)

log = logging.getLogger(__name__)

_PROXY_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_OPTIONAL = ("model_index.json", "scheduler/scheduler_config.json")


def fetch(model_id: str, *, weights: bool = True) -> Path:
    """The snapshot of a hub id: the newest one if the hub answers, else the one in the cache. Downloads can resume.

    Without ``weights`` only the small files are fetched and needed. Raises CheckpointError.
    """
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        raise broken(f"--model-path {model_id!r}: neither a folder that exists nor a hub id") from None
    if constants.HF_HUB_OFFLINE:
        return _cached(model_id, "HF_HUB_OFFLINE is set", weights=weights)
    try:
        return _download(model_id, weights=weights)
    except CheckpointError:
        raise
    except Exception as error:
        # The libraries under the download raise errors of every kind: of the hub, HTTP, proxies, files and values.
        reason = _reason(error)
    path = _cached(model_id, reason, weights=weights)
    log.warning("%s: nothing fetched from the hub (%s); loading the copy in the cache, %s", model_id, reason, path)
    return path


def _download(model_id: str, *, weights: bool) -> Path:
    """First the small files, then the weights that they name, of the same revision."""
    path = Path(snapshot_download(model_id, allow_patterns=list(SMALL_FILES)))
    if not path.is_dir():
        raise broken(f"--model-path {model_id}: the repository has none of {listed(CONFIGS)}: it is no diffusers model")
    wanted = [f"{part}/{name}" for part in WEIGHTS for name in weight_names(path / part)] if weights else []
    if not os.path.lexists(path / TOKENIZER / "tokenizer.json"):
        wanted.append(f"{TOKENIZER}/{TOKENIZER_MODEL}")
    if wanted:
        snapshot_download(model_id, revision=path.name, allow_patterns=wanted)
    return path


def _cached(model_id: str, reason: str, *, weights: bool) -> Path:
    """The complete snapshot in the cache. ``reason``: why nothing can be fetched. Raises CheckpointError."""
    cache = Path(constants.HF_HUB_CACHE)
    try:
        path = newest_snapshot(cache / repository_folder(model_id))
    except OSError as error:
        raise system_error(cache / repository_folder(model_id), error) from None
    if path is None:
        raise broken(
            f"--model-path {model_id}: no such folder, and the hub's cache {cache} has no copy of the model, which "
            f"cannot be fetched ({reason}); {_way_out(model_id)}"
        )
    absent = list(_absent(path, weights=weights))
    if absent:
        raise broken(
            f"--model-path {model_id}: {path} misses {len(absent)} files, which cannot be fetched ({reason}): "
            f"{listed(absent)}; {_way_out(model_id)}"
        )
    return path


def _absent(path: Path, *, weights: bool) -> Iterator[str]:
    """Files that the loader needs and a snapshot does not have."""
    needed = [name for name in CONFIGS if name not in _OPTIONAL]
    if weights:
        needed += [f"{part}/{name}" for part in WEIGHTS for name in weight_names(path / part)]
        needed.append(f"{TOKENIZER}/tokenizer_config.json")
    for name in needed:
        if not (path / name).exists():
            yield name
    if weights and not any((path / TOKENIZER / name).exists() for name in (TOKENIZER_FILES[0], TOKENIZER_MODEL)):
        yield f"{TOKENIZER}/{TOKENIZER_FILES[0]}"


def _reason(error: Exception) -> str:
    """Why a download failed, with what its reader can change."""
    if isinstance(error, GatedRepoError):
        return "the hub gives this model only to users with access: set HF_TOKEN to the token of one"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or gives it only to users with access: set HF_TOKEN to the token of one"
    proxies = {name: os.environ[name] for v in _PROXY_VARIABLES for name in (v, v.lower()) if os.environ.get(name)}
    if isinstance(error, ImportError) and "socksio" in str(error):
        names = ", ".join(name for name, value in proxies.items() if value.lower().startswith("socks"))
        return f"{names or 'a proxy variable'} names a SOCKS proxy, which needs the package socksio"
    text = one_line(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; HF_HOME names another folder for the cache"
    return f"{text}; {', '.join(proxies)} is set" if "proxy" in text.lower() and proxies else text


def _way_out(model_id: str) -> str:
    name = Path(model_id).name
    return f"put its files in a folder and name the folder, for example --model-path ./models/{name}"
