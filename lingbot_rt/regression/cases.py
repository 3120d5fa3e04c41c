"""Case files: the sessions that ``check`` runs, and how much a build may differ.

A TOML file has one ``[[case]]`` table per case: an init, events pinned to chunks, a number of chunks, and thresholds.
``[defaults]`` has the fields that all cases share.
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
    """Limits of a pass: lower limits for PSNR and SSIM, upper limits for difference and growth."""

    min_psnr: float = 45.0  # dB, of the worst key frame
    min_ssim: float = 0.98  # of the worst key frame
    max_mean_abs_diff: float = 1.0  # grey levels, of the worst key frame
    exact: bool = False  # every frame must equal the recorded one, if model, device and dtype are the same
    max_latency_growth: float = 1.5  # p50 and p95 of chunk_total_ms and dit_ms, divided by the recorded ones
    max_payload_growth: float = 1.1  # the same for ws_payload_mb


class CaseEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event that takes effect in chunk ``chunk``."""

    chunk: Annotated[int, Meta(ge=0)]
    kind: str
    payload: Any
    event_id: int | None = None


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]+$")]  # also the folder of its ground truth
    chunks: Annotated[int, Meta(ge=1)]
    init: dict[str, Any]  # as on the wire; first_frame is a path in the file and the picture's bytes here
    events: tuple[CaseEvent, ...] = ()
    # `check run` in one process saves the session before these chunks and goes on from the file.
    reopen_before: tuple[Annotated[int, Meta(ge=1)], ...] = ()
    thresholds: Thresholds = Thresholds()
    keep_every: Annotated[int, Meta(ge=1)] = 1  # save key frames of every k-th chunk
    ignore_initial_chunks: Annotated[int, Meta(ge=0)] = 1  # left out of times and sizes


def load_cases(path: Path) -> list[Case]:
    """Reads a case file. Picture paths are relative to it. Raises ConfigError that names the case and the field."""
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
    """Raises ConfigError or RequestError for what a server would refuse, or would ignore without an error."""
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
