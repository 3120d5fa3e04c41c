"""The weights of one part of a model folder: which tensor of which file belongs to which tensor of the network.

Names, shapes and types in the headers of the files are compared with the network before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lingbot_rt.models.file_checks import broken, listed, require_file, shorten, system_error
from lingbot_rt.models.folder import WeightFiles, weight_files

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types of tensors that weights are copied from. Whole numbers are quantized weights, which need more than a copy."""

_DIFFUSERS_NAMES = [
    (r"condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.attn1\.(norm_[qk])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.(norm_[qk])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"scale_shift_table$", "head.modulation"),
    (r"proj_out\.", "head.head."),
]
"""diffusers' parameter names -> the original checkpoint's."""


def original_name(name: str) -> str:
    """A name of the transformer's files as the original checkpoint has it."""
    for pattern, replacement in _DIFFUSERS_NAMES:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


@dataclass(frozen=True, slots=True)
class _Copy:
    """One tensor of a file."""

    path: Path
    name: str


class FolderWeights:
    """Fills a network from the safetensors files of one part, in any order of its tensors."""

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        folder: Path,
        rename: Callable[[str], str] = lambda name: name,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Reads headers only. ``targets``: the network's tensors. ``rename``: name in a file -> name of the target.

        ``aliases``: names that are passed over if the files also have the other name. Raises CheckpointError unless
        every target has one tensor of its shape, and every tensor is for a target.
        """
        self._copies = _match(targets, folder, rename, aliases or {})
        self._files: dict[Path, Any] = {}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copies the tensors of the files into ``targets``, one at a time in memory. Raises CheckpointError."""
        for name, target in targets.items():
            copy = self._copies[name]
            with _reading(copy.path):
                if copy.path not in self._files:
                    self._files[copy.path] = safe_open(copy.path, framework="pt")
                target.copy_(self._files[copy.path].get_tensor(copy.name))


def _match(
    targets: Mapping[str, Tensor], folder: Path, rename: Callable[[str], str], aliases: Mapping[str, str]
) -> dict[str, _Copy]:
    """Target -> the tensor that it gets. Raises CheckpointError."""
    files = weight_files(folder)
    found: dict[str, Path] = {}
    headers: dict[str, tuple[list[int], str]] = {}
    for path in files.paths:
        require_file(path)
        with _reading(path), safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                if name in found:
                    raise broken(f"{path} and {found[name].name} both have {shorten(name)}: fetch the model again")
                found[name] = path
                header = file.get_slice(name)
                headers[name] = (header.get_shape(), header.get_dtype())
    _require_listed(files, found)
    copies: dict[str, _Copy] = {}
    extra, misshapen = [], []
    for name, (shape, dtype) in headers.items():
        if aliases.get(name) in headers:
            continue
        target = rename(name)
        if target not in targets:
            extra.append(name)
        elif target in copies:
            raise broken(
                f"{found[name]}: {shorten(name)} and {shorten(copies[target].name)} are the same tensor of the network:"
                " remove one"
            )
        else:
            copies[target] = _Copy(found[name], name)
            if list(targets[target].shape) != shape:
                misshapen.append(f"{name} {shape} for {list(targets[target].shape)}")
            elif dtype not in _FLOATS:
                misshapen.append(f"{name} of type {dtype}")
    problems = (("missing", sorted(targets.keys() - copies)), ("unexpected", extra), ("misshapen", misshapen))
    parts = [f"{len(names)} {what}: {listed(names)}" for what, names in problems if names]
    if parts:
        raise broken(f"{folder} does not fit its config.json: {'; '.join(parts)}; fetch both of the same model")
    return copies


def _require_listed(files: WeightFiles, found: dict[str, Path]) -> None:
    """Raises CheckpointError unless the index, if there is one, lists each tensor under the file that has it."""
    if files.weight_map is None:
        return
    wrong = [name for name, shard in files.weight_map.items() if name not in found or found[name].name != shard]
    wrong += [name for name in found if name not in files.weight_map]
    if wrong:
        raise broken(
            f"{files.index} does not fit its files: {len(wrong)} tensors are in another file than it says, or in none: "
            f"{listed(wrong)}; fetch the index and the weights again"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while ``path`` is read into CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        raise broken(f"{path} is incomplete or damaged ({error}): fetch it again") from None
    except OSError as error:
        raise system_error(path, error) from None
