"""The files of a model folder in diffusers' layout: which ones are read, and whether each one is what it seems.

Weights follow from their standard name or from their index, never from what else a folder has. The same list decides
what is fetched from the hub.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lingbot_rt.errors import CheckpointError
from lingbot_rt.models.file_checks import broken, listed, require_file, system_error
from lingbot_rt.models.json_file import JsonFile, as_json

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Part -> standard name of its weights: NAME.safetensors, or shards that NAME.safetensors.index.json lists."""

CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in WEIGHTS))
TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_MODEL = "spiece.model"
"""SentencePiece's own format. It is read only where there is no tokenizer.json."""

PARTS = (*WEIGHTS, TOKENIZER)
SMALL_FILES = (
    *CONFIGS,
    *(f"{part}/{name}.safetensors.index.json" for part, name in WEIGHTS.items()),
    *(f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES),
)
"""Files that tell which others are read."""

_OTHER_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights of one part."""

    paths: tuple[Path, ...]
    index: Path | None
    weight_map: dict[str, str] | None  # tensor -> name of its file by the index


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> name of its file by the index of a part's folder; None without an index. Raises CheckpointError."""
    index = _index(folder)
    if not os.path.lexists(index):
        return None
    file = JsonFile(index)
    names = file.values.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        file.refuse("weight_map", "an object with the file of each tensor")
    for shard in set(names.values()):
        # A name with a folder would lead out of the model.
        is_name = Path(shard).name == shard and shard.isprintable() and not shard.startswith(".")
        if not is_name or not shard.endswith(".safetensors"):
            raise broken(f"{index}: weight_map names {as_json(shard)}, expected a .safetensors file beside the index")
    return names


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files that a part's folder has to have. Raises CheckpointError for a damaged index."""
    names = weight_map(folder)
    return [_single(folder).name] if names is None else sorted(set(names.values()))


def weight_files(folder: Path) -> WeightFiles:
    """The weight files of a part's folder. None of them is opened. Raises CheckpointError."""
    single, index, names = _single(folder), _index(folder), weight_map(folder)
    if names is None:
        if not os.path.lexists(single):
            raise _without_weights(folder, single.name)
        return WeightFiles((single,), None, None)
    shards = sorted(set(names.values()))
    if single.name not in shards and os.path.lexists(single):
        raise broken(
            f"{folder} has {single.name} and {index.name}, which names other files: remove the one that is not the "
            "model"
        )
    absent = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if absent:
        raise broken(
            f"{folder} misses {len(absent)} of the {len(shards)} shards that {index.name} names: {listed(absent)}: "
            "fetch the model again"
        )
    return WeightFiles(tuple(folder / shard for shard in shards), index, names)


def _single(folder: Path) -> Path:
    return folder / f"{WEIGHTS[folder.name]}.safetensors"


def _index(folder: Path) -> Path:
    return folder / f"{WEIGHTS[folder.name]}.safetensors.index.json"


def _without_weights(folder: Path, standard: str) -> CheckpointError:
    try:
        others = _weight_like(folder)
    except OSError as error:
        return system_error(folder, error)
    if not others:
        return broken(f"{folder} has no {standard}: fetch the model again")
    return broken(
        f"{folder} has no {standard} and no {standard}.index.json, but {listed(others)}: give the right one the "
        "standard name, or fetch the index of the shards"
    )


def _weight_like(folder: Path) -> list[str]:
    """Names in a folder that could be taken for weights. Names that begin with a dot are the system's own."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return [name for name in names if name.rstrip("/").endswith(_OTHER_WEIGHTS) and not name.startswith(".")]


def left_out(path: Path) -> list[str]:
    """Files of a model folder that look like weights and are not read, as ``PART/NAME``. Raises CheckpointError."""
    found = []
    for part in WEIGHTS:
        weights = weight_files(path / part)
        read = {file.name for file in (*weights.paths, *([weights.index] if weights.index else []))}
        try:
            found += [f"{part}/{name}" for name in _weight_like(path / part) if name not in read]
        except OSError as error:
            raise system_error(path / part, error) from None
    return found


def has_tokenizer(path: Path) -> bool:
    """Whether the model folder ``path`` has all files of a tokenizer, damaged or not."""
    folder = path / TOKENIZER
    has_vocabulary = any(os.path.lexists(folder / name) for name in ("tokenizer.json", TOKENIZER_MODEL))
    return has_vocabulary and os.path.lexists(folder / "tokenizer_config.json")


def tokenizer_files(path: Path) -> list[Path]:
    """The files that the tokenizer is read from. Raises CheckpointError for one that is missing or damaged."""
    folder = path / TOKENIZER
    found = [folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
    for file in found:
        JsonFile(file)
    if folder / "tokenizer_config.json" not in found:
        raise broken(f"{folder} has no tokenizer_config.json: fetch the model again")
    if folder / "tokenizer.json" not in found:
        if not os.path.lexists(folder / TOKENIZER_MODEL):
            raise broken(f"{folder} has no tokenizer.json and no {TOKENIZER_MODEL}: fetch the model again")
        require_file(folder / TOKENIZER_MODEL)
        found.append(folder / TOKENIZER_MODEL)
    return found
