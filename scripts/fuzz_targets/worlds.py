"""Saved worlds of strangers: a session that goes on, or one line that says what is wrong."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.server.live_session import LiveSession, SavedSession
from lingbot_rt.session.messages import EXTENSIONS, Event, Init
from lingbot_rt.session.session import Session
from lingbot_rt.session.settings import resolve
from lingbot_rt.session.world_file import FIRST_FRAME, FORMAT, read_world
from lingbot_rt.telemetry import Metrics
from lingbot_rt.telemetry.session import SessionTelemetry
from scripts.fuzz_targets.bounds import check_refusal, mutated, noted, within
from scripts.fuzz_targets.messages import KINDS, payload
from tests.server.fake_engine import CARD

_CONFIG = ServeConfig()
_INIT = Init(prompt="A street.", first_frame=b"", size="64x64", protocol_extensions=EXTENSIONS)
_METRICS = Metrics()
_VALUES = (None, True, 0, 1, -1, 511, 512, 1024, 2**53, 2**64, 0.5, -1e13, "", "w", "x" * 9000, [], {}, [[]], [0, 1])


def try_case(random: Random) -> str:
    about, index = _walk(random)
    kind = random.choice(("whole", "text", "text", "bytes"))
    if kind == "text":
        loaded = json.loads(about)
        for _ in range(random.choice((1, 1, 3))):
            _spoil(loaded, random)
        about = json.dumps(loaded)
    world = {"chunk_index": index, "model": {}}
    metadata = {"format": FORMAT, "world": json.dumps(world), "about": about}
    data = save({FIRST_FRAME: np.zeros((64, 64, 3), np.uint8)}, metadata)
    if kind == "bytes":
        data = mutated(data, random, others=[data[:4096]])
    elif random.random() < 0.02:
        metadata["about"] = random.choice(('{"init":' + "[" * 10**6, '{"init":{"x":[' + "[]," * 10**6))
        data = save({FIRST_FRAME: np.zeros((64, 64, 3), np.uint8)}, metadata)
    with noted(about), within(96 * 2**20):
        try:
            file = read_world(data)
            saved = SavedSession.of(file, CARD, _CONFIG)
            session = Session.restored("s", saved.settings, saved.control)
        except InvalidInit as error:
            return check_refusal(error, needs_field=True)
        _play(session, random)
    return "session"


def _walk(random: Random) -> tuple[str, int]:
    """What the server writes of a session, and its next chunk."""
    session = Session("s", resolve(_INIT, CARD, _CONFIG))
    _play(session, random)
    live = LiveSession(session, _INIT, SessionTelemetry(session, _METRICS, None, 0.0))
    return live.about(), session.next_index


def _play(session: Session, random: Random) -> None:
    for _ in range(random.choice((1, 3, 8))):
        if random.random() < 0.5:
            kind = random.choice(KINDS)
            try:
                session.receive(Event(kind=kind, payload=payload(random, kind), event_id=random.randrange(99)), 0.0)
            except InvalidEvent:
                continue
        elif not session.is_complete:
            plan = session.next_chunk(0.0).plan
            poses = plan.relative_poses
            assert poses is None or np.isfinite(poses).all(), "a pose that is no number"
            msgspec.msgpack.encode(plan.prompt)


def _spoil(value: Any, random: Random) -> None:
    """Replaces something at any depth, or takes it away."""
    while isinstance(value, dict | list) and value:
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        if not isinstance(value[key], dict | list) or not value[key] or random.random() < 0.15:
            if random.random() < 0.2:
                del value[key]
            else:
                value[key] = random.choice(_VALUES)
            return
        value = value[key]
