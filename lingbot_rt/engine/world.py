"""A session as a file and back: ``session/world_file.py`` says what the file is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

import lingbot_rt
from lingbot_rt.engine.going_back import set_back
from lingbot_rt.engine.history import KeptChunk, WholeState, window_indices
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.world_tensors import WorldTensors
from lingbot_rt.errors import InvalidInit
from lingbot_rt.session.messages import MAX_PROMPT_CHARACTERS
from lingbot_rt.session.plan import Rewound, SessionPlan
from lingbot_rt.session.world_file import FIRST_FRAME, FORMAT, read_world

MAX_CHUNKS = 10**7
"""Most chunks before a snapshot: more than a year of them."""

_PLAN = ("size", "latent_frames", "sink_frames", "window_frames", "recent_frames")
"""What of a plan must be the same, beside guidance: the window has its shape from it."""


WorldParts = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and texts of a file."""


def world_parts(pipeline: Pipeline, session: SessionState, about: str) -> WorldParts:
    """The session at the end of its newest chunk. ``about`` is a text for the reader. Nothing large is copied."""
    history, plan = session.history, session.plan
    window = history.window()
    tensors: dict[str, Tensor] = {FIRST_FRAME: torch.tensor(plan.first_frame)}
    for chunk in window:
        tensors |= dict(_chunk_tensors(chunk, is_newest=chunk is window[-1]))
    world = {
        "chunk_index": history.next_index,
        "model": pipeline.identity,
        "build": _build(pipeline),
        "plan": _plan_fields(plan),
        "chunks": [_chunk_fields(chunk, is_newest=chunk is window[-1]) for chunk in window],
    }
    return tensors, {"format": FORMAT, "world": json.dumps(world), "about": about}


def to_bytes(parts: WorldParts) -> bytes:
    """The file of ``world_parts``."""
    tensors, texts = parts
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, texts)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checked file."""

    chunk_index: int  # the next chunk
    window: list[KeptChunk]
    is_same_build: bool  # False: frames differ in rounding at least


def read_snapshot(pipeline: Pipeline, plan: SessionPlan, data: bytes) -> Snapshot:
    """What ``to_bytes`` made, for a session of ``plan``.

    Raises InvalidInit with the field ``resume`` when it is of another model or another window, or damaged.
    """
    world = read_world(data).world
    _require(world["model"], pipeline.identity, "model")
    build = _build(pipeline)
    try:
        is_same_build = world["build"] == build
        # Each of several ranks has some of the K/V only: no file of theirs holds any, whatever it says.
        with_kv = is_same_build and pipeline.ranks.world == 1
        _require(world["plan"], _plan_fields(plan), "session")
        chunks, boundary = world["chunks"], int(world["chunk_index"])
        expected = window_indices(plan.latent_frames, plan.sink_frames, plan.window_frames, boundary)
        if boundary > MAX_CHUNKS or [fields["index"] for fields in chunks] != expected:
            raise ValueError("the chunks of the window")
        tensors = WorldTensors(pipeline, plan, load(data))
        window = [_chunk(fields, tensors, plan, is_newest=fields is chunks[-1], with_kv=with_kv) for fields in chunks]
        states = [chunk.whole for chunk in window if chunk.whole is not None]
        if window and len(states) == len(window):
            tensors.check_window(states, boundary)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidInit(f"the snapshot is damaged ({type(error).__name__})", field="resume") from None
    return Snapshot(boundary, window, is_same_build)


def go_on_from(pipeline: Pipeline, session: SessionState, snapshot: Snapshot) -> Rewound:
    """Sets a session that has just been opened to where the snapshot was taken. Raises ChunkCancelled."""
    session.history.begin_at(snapshot.window, snapshot.chunk_index)
    is_exact = set_back(pipeline, session, snapshot.window, snapshot.chunk_index)
    return Rewound(snapshot.chunk_index, 0, is_exact and snapshot.is_same_build)


def _build(pipeline: Pipeline) -> dict[str, Any]:
    """What the bits of a frame depend on beside model and session."""
    info = pipeline.model_info
    names = ("device", "dtype", "num_ranks", "attention_backend", "kv_cache_dtype", "quantization", "vae_dtype",
             "vae_parallel")  # fmt: skip
    versions = {"lingbot_rt": lingbot_rt.__version__, "torch": torch.__version__, "compiled": info.compiled}
    return {name: getattr(info, name) for name in names} | versions


def _plan_fields(plan: SessionPlan) -> dict[str, Any]:
    found = {name: getattr(plan, name) for name in _PLAN}
    return found | {
        "size": str(plan.size),
        "recent_frames": list(plan.recent_frames),
        "guidance": plan.guidance_scale > 1,
    }


def _require(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise InvalidInit(
                f"the snapshot is of another {what}: {name} {str(found.get(name))[:60]}, expected {str(value)[:60]}",
                field="resume",
            )


# --- one chunk ---


def _chunk_fields(chunk: KeptChunk, *, is_newest: bool) -> dict[str, Any]:
    names = ("index", "prompt", "recent_frames", "recached", "pending", "prompts")
    fields: dict[str, Any] = {name: getattr(chunk, name) for name in names}
    if chunk.whole is not None:
        features = [slot if isinstance(slot, str) else slot is not None for slot in chunk.whole.features]
        fields["whole"] = {
            "frame_of_slot": chunk.whole.frame_of_slot,
            "kv": list(chunk.whole.kv),
            "again": list(chunk.whole.again) if is_newest else [],
            "features": features,
        }
    return fields


def _chunk_tensors(chunk: KeptChunk, *, is_newest: bool) -> Iterator[tuple[str, Tensor]]:
    """Of the features, and of what was computed again, only the newest chunk's are needed."""
    place = f"chunk.{chunk.index}"
    yield f"{place}.latents", chunk.latents
    yield f"{place}.random_state", chunk.random_state
    for name in ("relative_poses", "lenses"):
        array = getattr(chunk, name)
        if array is not None:
            yield f"{place}.{name}", torch.tensor(array)
    if chunk.whole is None:
        return
    for part, frames in (("kv", chunk.whole.kv), ("again", chunk.whole.again if is_newest else {})):
        for frame, windows in frames.items():
            for number, kv in enumerate(windows):
                yield f"{place}.{part}.{frame}.{number}", kv
    if is_newest:
        for number, slot in enumerate(chunk.whole.features):
            if isinstance(slot, Tensor):
                yield f"{place}.features.{number}", slot
        if chunk.whole.last_frame is not None:
            yield f"{place}.last_frame", chunk.whole.last_frame


def _chunk(
    fields: Mapping[str, Any], tensors: WorldTensors, plan: SessionPlan, *, is_newest: bool, with_kv: bool
) -> KeptChunk:
    """``with_kv``: whether keys, values and features of this build can be used. Raises ValueError and InvalidInit."""
    place = f"chunk.{int(fields['index'])}"
    poses, lenses = tensors.per_frame(f"{place}.relative_poses", 4, 4), tensors.per_frame(f"{place}.lenses", 4)
    chunk = KeptChunk(
        index=int(fields["index"]),
        latents=tensors.latents(place),
        prompt=str(fields["prompt"]),
        relative_poses=None if poses is None else poses.numpy(),
        lenses=None if lenses is None else lenses.numpy(),
        recent_frames=None if fields["recent_frames"] is None else int(fields["recent_frames"]),
        recached=None if fields["recached"] is None else int(fields["recached"]),
        pending=tuple(int(index) for index in fields["pending"]),
        prompts={int(index): str(prompt) for index, prompt in fields["prompts"].items()},
        random_state=tensors.random_state(place),
        whole=_whole(fields["whole"], tensors, place, is_newest=is_newest) if with_kv and "whole" in fields else None,
    )
    if not all(0 < len(prompt) <= MAX_PROMPT_CHARACTERS for prompt in (chunk.prompt, *chunk.prompts.values())):
        raise ValueError("a prompt")
    if chunk.recent_frames is not None and chunk.recent_frames not in plan.recent_frames:
        raise ValueError("recent_frames")
    return chunk


def _whole(fields: Mapping[str, Any], tensors: WorldTensors, place: str, *, is_newest: bool) -> WholeState:
    def windows(part: str) -> dict[int, tuple[Tensor, ...]]:
        return {int(frame): tensors.windows(f"{place}.{part}", int(frame)) for frame in fields[part]}

    again = windows("again")
    return WholeState(
        frame_of_slot=tuple(None if frame is None else int(frame) for frame in fields["frame_of_slot"]),
        kv=windows("kv"),
        again=again,
        new_again=tuple(again),
        features=tensors.features(place, fields["features"]) if is_newest else [],
        last_frame=tensors.last_frame(place) if is_newest else None,
    )
