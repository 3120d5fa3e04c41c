"""Case files: what the guard plays and how far a build may differ.

A TOML file holds ``[defaults]`` and a ``[[case]]`` each. A case is an init, events pinned to chunks, a number of
chunks, and thresholds; ``defaults`` holds what the cases share.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from lingbot_rt.errors import ConfigError, RequestError
from lingbot_rt.session.controls import parse_event
from lingbot_rt.session.messages import Init, decode


class Thresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The least (PSNR, SSIM) and the most (difference, growth) that still passes."""

    min_psnr: float = 45.0  # dB, of the worst key frame
    min_ssim: float = 0.98  # of the worst key frame
    max_mean_abs_diff: float = 1.0  # grey levels, of the worst key frame
    exact: bool = False  # every frame's hash must be the recorded one, where the same device made the truth
    max_latency_growth: float = 1.5  # p50 and p95 of chunk_total_ms and dit_ms, against the recorded ones
    max_payload_growth: float = 1.1  # the same of ws_payload_mb


class CaseEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event that chunk ``chunk`` samples."""

    chunk: Annotated[int, Meta(ge=0)]
    kind: str
    payload: Any
    event_id: int | None = None


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]+$")]  # also the folder of its ground truth
    chunks: Annotated[int, Meta(ge=1)]
    init: dict[str, Any]  # as on the wire; the first frame is a picture's path in the file, its bytes once read
    events: tuple[CaseEvent, ...] = ()
    thresholds: Thresholds = Thresholds()
    keep_every: Annotated[int, Meta(ge=1)] = 1  # key frames are kept of every k-th chunk
    ignore_initial_chunks: Annotated[int, Meta(ge=0)] = 1  # left out of the figures that are guarded


def load_cases(path: Path) -> list[Case]:
    """Reads a case file; pictures are named relative to it. Raises ConfigError naming the case and the field."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    entries = table.get("case", [])
    if not entries:
        raise ConfigError(f"{path} has no [[case]]")
    cases = [_case(path, table.get("defaults", {}), entry) for entry in entries]
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: case names must differ, got {', '.join(names)}", field="name")
    return cases


def _case(path: Path, defaults: dict[str, Any], entry: dict[str, Any]) -> Case:
    values = defaults | entry
    for shared in ("init", "thresholds"):
        values[shared] = defaults.get(shared, {}) | entry.get(shared, {})
    try:
        values["init"] = {"type": "init", **values["init"], "first_frame": _picture(path, values["init"])}
        case = msgspec.convert(values, Case)
        _check(case)
    except (ConfigError, RequestError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: case {entry.get('name')!r}: {error}", field="case") from None
    return case


def _picture(path: Path, init: dict[str, Any]) -> bytes:
    picture = init.get("first_frame")
    if not isinstance(picture, str):
        raise ConfigError("init.first_frame must be a file's path")
    try:
        return (path.parent / picture).read_bytes()
    except OSError as error:
        raise ConfigError(f"{picture}: {error.strerror}") from None


def _check(case: Case) -> None:
    """What a server would refuse or, worse, ignore."""
    unknown = case.init.keys() - {"type", *Init.__struct_fields__}
    if unknown:
        raise ConfigError(f"init has no {', '.join(sorted(unknown))}")
    decode(msgspec.msgpack.encode(case.init))
    for event in case.events:
        if event.chunk >= case.chunks:
            raise ConfigError(f"event at chunk {event.chunk} of {case.chunks}")
        parse_event(event.kind, event.payload)
    if case.ignore_initial_chunks >= case.chunks:
        raise ConfigError(f"ignore_initial_chunks {case.ignore_initial_chunks} leaves none of {case.chunks} chunks")
