"""Case files: what the guard plays and how far a build may differ.

A TOML file holds ``[defaults]`` and a ``[[case]]`` each. A case is an init, events pinned to chunks, a number of
chunks, and thresholds; ``defaults`` holds the init fields, thresholds and guards that the cases share.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lingbot_rt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The least (PSNR, SSIM) and the most (difference, growth) that still passes."""

    min_psnr: float = 45.0  # dB, of the worst key frame
    min_ssim: float = 0.98  # of the worst key frame
    max_mean_abs_diff: float = 1.0  # grey levels, of the worst key frame
    exact: bool = False  # every frame's hash must be the recorded one
    max_latency_growth: float = 1.5  # p50 and p95 of chunk_total_ms and dit_ms, against the recorded ones
    max_payload_growth: float = 1.1  # bytes a chunk, against the recorded ones


@dataclass(frozen=True, slots=True)
class CaseEvent:
    """An event that chunk ``chunk`` samples."""

    chunk: int
    kind: str
    payload: Any
    event_id: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    chunks: int
    init: dict[str, Any]  # as on the wire, the first frame as bytes
    events: tuple[CaseEvent, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    keep_every: int = 1  # key frames are kept of every k-th chunk
    warm_chunks: int = 2  # left out of the latency figures


_CASE_KEYS = {"name", "chunks", "init", "events", "thresholds", "keep_every", "warm_chunks"}


def load_cases(path: Path) -> list[Case]:
    """Reads a case file; pictures are named relative to it. Raises ConfigError naming the case and the field."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    defaults = table.get("defaults", {})
    entries = table.get("case", [])
    if not entries:
        raise ConfigError(f"{path} has no [[case]]")
    cases = [_case(path, defaults, entry) for entry in entries]
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: case names must differ, got {', '.join(names)}", field="name")
    return cases


def _case(path: Path, defaults: dict[str, Any], entry: dict[str, Any]) -> Case:
    name = entry.get("name")
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{path}: case name {name!r} must be letters, digits, - and _", field="name")
    values = {key: value for key, value in defaults.items() if key not in ("init", "thresholds")} | entry
    unknown = set(values) - _CASE_KEYS
    if unknown:
        raise ConfigError(f"{path}: case {name}: unknown {', '.join(sorted(unknown))}", field=min(unknown))
    if not isinstance(values.get("chunks"), int) or values["chunks"] < 1:
        raise ConfigError(f"{path}: case {name}: chunks must be a whole number >= 1", field="chunks")
    init = defaults.get("init", {}) | entry.get("init", {})
    events = tuple(_event(path, name, values["chunks"], event) for event in values.get("events", []))
    return Case(
        name=name,
        chunks=values["chunks"],
        init={"type": "init", **init, "first_frame": _picture(path, name, init)},
        events=events,
        thresholds=_thresholds(path, name, defaults.get("thresholds", {}) | entry.get("thresholds", {})),
        keep_every=values.get("keep_every", 1),
        warm_chunks=values.get("warm_chunks", 2),
    )


def _picture(path: Path, name: str, init: dict[str, Any]) -> bytes:
    picture = init.get("first_frame")
    if not isinstance(picture, str):
        raise ConfigError(f"{path}: case {name}: init.first_frame must be a file's path", field="first_frame")
    try:
        return (path.parent / picture).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: case {name}: {picture}: {error.strerror}", field="first_frame") from None


def _event(path: Path, name: str, chunks: int, entry: dict[str, Any]) -> CaseEvent:
    try:
        event = CaseEvent(**entry)
    except TypeError as error:
        raise ConfigError(f"{path}: case {name}: event {entry}: {error}", field="events") from None
    if not 0 <= event.chunk < chunks:
        raise ConfigError(f"{path}: case {name}: event at chunk {event.chunk} of {chunks}", field="events")
    return event


def _thresholds(path: Path, name: str, values: dict[str, Any]) -> Thresholds:
    unknown = set(values) - {known.name for known in fields(Thresholds)}
    if unknown:
        raise ConfigError(f"{path}: case {name}: unknown threshold {', '.join(sorted(unknown))}", field="thresholds")
    return Thresholds(**values)
