"""The session's state machine: any order of events, pauses, chunks and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec
import numpy as np

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidEvent, PauseExpired
from lingbot_rt.session.controls import MAX_PENDING, MAX_WAITING
from lingbot_rt.session.messages import Event, Init, decode
from lingbot_rt.session.plan import ChunkResult, ChunkTimings
from lingbot_rt.session.server_messages import EncodedBatch
from lingbot_rt.session.session import HEARTBEAT_S, MAX_RECORDED_EVENTS, Chunk, SendTimes, Session
from lingbot_rt.session.settings import resolve
from scripts.fuzz_targets.bounds import check_refusal, noted
from scripts.fuzz_targets.messages import KINDS, payload, value
from tests.server.fake_engine import CARD

_PAUSE_LIMIT_S = 20.0
_RESULT = ChunkResult(0, 1, 1, ChunkTimings(0.1, 0.1, 0.1, 0.3))


def try_case(random: Random) -> str:
    seen = _Seen()
    session = _session(random, seen)
    with noted(seen.steps):
        try:
            for _ in range(random.choice((3, 10, 30))):
                _step(random, session, seen)
                _check_bounds(session)
            return _end(session, seen)
        except PauseExpired as error:
            assert seen.paused_at is not None, "a session that is not paused"
            assert seen.now - seen.paused_at > _PAUSE_LIMIT_S, "too early"
            return check_refusal(error)


@dataclass
class _Seen:
    """What the client did and heard. Every event has an id of its own."""

    now: float = 100.0
    events: int = 0
    open_ids: dict[int, int] = field(default_factory=dict)  # accepted, no final answer yet -> the chunk that was next
    applied: set[int] = field(default_factory=set)
    pinned: dict[int, list[int]] = field(default_factory=dict)  # chunk -> ids of the events that are pinned to it
    paused_at: float | None = None
    beat_at: float = 100.0
    chunks: int = 0
    steps: list[Any] = field(default_factory=list)

    def new_id(self) -> int:
        self.events += 1
        return self.events


def _session(random: Random, seen: _Seen) -> Session:
    pinned = []
    for _ in range(random.choice((0, 0, 1, 4))):
        kind, chunk, number = random.choice(KINDS[:4]), random.randrange(6), seen.new_id()
        pinned.append({"chunk": chunk, "kind": kind, "payload": payload(random, kind), "event_id": number})
        seen.pinned.setdefault(chunk, []).append(number)
    init = {
        "type": "init",
        "prompt": "A street.",
        "first_frame": b"-",
        "size": "64x64",
        "num_frames": random.choice((1, 9, 81)),
        "max_chunks": random.choice((None, 1, 2, 5)),
        "condition_inputs": random.choice((None, {"camera_actions": payload(random, "camera_actions")})),
        "protocol_extensions": ["control_ack", "heartbeat", "pause", "pinned_events"],
        "pinned_events": pinned,
    }
    camera = (init["condition_inputs"] or {}).get("camera_actions")  # type: ignore[attr-defined]
    if isinstance(camera, dict):
        init["condition_inputs"] = None
    seen.steps.append(init)
    message = decode(msgspec.msgpack.encode(init))
    assert isinstance(message, Init)
    settings = resolve(message, CARD, ServeConfig(pause_limit_s=_PAUSE_LIMIT_S))
    return Session("fuzz", settings, opened_at=seen.now, keep_events=random.random() < 0.5)


def _step(random: Random, session: Session, seen: _Seen) -> None:
    match random.randrange(10):
        case 0 | 1 | 2 | 3:
            _receive(random, session, seen)
        case 4 if random.random() < 0.1:
            for _ in range(random.choice((600, 1100, 5000))):
                _receive(random, session, seen, is_short=True)
        case 4 | 5:
            seen.now += random.choice((0.0, 0.01, 1.0, 4.9, 5.0, 19.0, 21.0))
            seen.steps.append(seen.now)
        case 6:
            _tick(session, seen)
        case _ if not session.is_complete and not session.is_paused:
            _chunk(session, seen)


def _receive(random: Random, session: Session, seen: _Seen, *, is_short: bool = False) -> None:
    kind, number = random.choice(KINDS[:2] if is_short else KINDS), seen.new_id()
    content = payload(random, kind) if is_short or random.random() < 0.9 else value(random, 2)
    if is_short and not isinstance(content, str):
        content = {"mode": "state", "transitions": [{"actions": ["w"]}]}
    event = Event(kind=kind, payload=content, event_id=number)
    seen.steps.append((kind, content, number) if not is_short else number)
    was_complete, before = session.is_complete, len(seen.open_ids)
    try:
        answers = _read(session.receive(event, seen.now))
    except InvalidEvent as error:
        check_refusal(error)
        assert len(seen.open_ids) == before
        return
    assert answers[0] == {"type": "control_ack", "state": "received", "event_id": number}
    seen.open_ids[number] = seen.chunks
    _answered(answers[1:], seen, chunk=seen.chunks, may_apply=kind in ("pause", "resume"))
    if kind == "pause" and seen.paused_at is None:
        seen.paused_at = seen.now
    elif kind == "resume":
        seen.paused_at = None
    assert session.is_paused == (seen.paused_at is not None)
    assert not was_complete or number not in seen.open_ids, "no chunk comes, and no answer either"


def _tick(session: Session, seen: _Seen) -> None:
    for beat in _read(session.tick(seen.now)):
        assert beat["type"] == "heartbeat"
        assert seen.now - seen.beat_at >= HEARTBEAT_S
        assert beat["state"] == ("paused" if seen.paused_at is not None else "running")
        seen.beat_at = seen.now
    if seen.paused_at is not None:
        assert seen.now - seen.paused_at <= _PAUSE_LIMIT_S, "the pause did not end"


def _chunk(session: Session, seen: _Seen) -> None:
    index, seen.chunks = seen.chunks, seen.chunks + 1
    seen.steps.append("chunk")
    for number in seen.pinned.get(index, ()):
        seen.open_ids[number] = index
    chunk = session.next_chunk(seen.now)
    assert chunk.plan.chunk_index == index
    poses = chunk.plan.relative_poses
    count = session.settings.latent_frames
    assert poses is None or (poses.shape == (count, 4, 4) and np.isfinite(poses).all())
    assert chunk.plan.intrinsics is None or chunk.plan.intrinsics.shape == (count, 4)
    _answered(_read(chunk.acknowledgements), seen, chunk=index, may_apply=True)
    assert chunk.plan.event_id is None or chunk.plan.event_id in seen.applied, "an id in force that was never applied"
    _send(session, chunk, seen)


def _send(session: Session, chunk: Chunk, seen: _Seen) -> None:
    """Its frames leave in two batches."""
    for _ in range(2):
        payload_bytes = bytes(12)
        batch = EncodedBatch("image/webp", "webp", 1, payload_bytes, (12,), 64, 64, 64, 64, 64 * 64 * 3)
        (header,) = _read(session.frame_batch(chunk, batch))
        assert header.get("event_id") == chunk.plan.event_id
        seen.now += 0.01
        session.sent(chunk, SendTimes(1.0, 1.0, seen.now), 0.0)
    (stats,) = _read((session.stats(chunk, _RESULT),))
    assert stats["event_id"] == chunk.plan.event_id
    assert all(number >= 0 for number in stats.values() if isinstance(number, int | float))


def _answered(answers: list[dict[str, Any]], seen: _Seen, *, chunk: int, may_apply: bool) -> None:
    """Final answers: each to an event that has none yet, those of a chunk in the order of arrival."""
    applied = []
    for answer in answers:
        number = answer["event_id"]
        assert number in seen.open_ids, f"event {number} is answered twice, or was refused"
        del seen.open_ids[number]
        if answer["state"] == "applied":
            assert may_apply
            assert answer["chunk_index"] == chunk
            applied.append(number)
        else:
            assert answer["state"] == "dropped"
    in_order = [number for number in applied if not any(number in ids for ids in seen.pinned.values())]
    assert in_order == sorted(in_order), "not in the order of arrival"
    seen.applied.update(applied)


def _check_bounds(session: Session) -> None:
    queue = session._queue
    assert queue.pending <= MAX_PENDING
    assert len(queue._waiting) <= MAX_WAITING
    assert len(session._arrived) <= MAX_RECORDED_EVENTS


def _end(session: Session, seen: _Seen) -> str:
    """Two chunks after the last event, pinned ones included, or after the last chunk, each has its final answer."""
    for _ in range(max(max(seen.pinned, default=0) - seen.chunks, 0) + 2):
        if not session.is_complete:
            _chunk(session, seen)
    assert not seen.open_ids, f"events without a final answer: {seen.open_ids}"
    return "complete" if session.is_complete else "left"


def _read(messages: tuple[bytes, ...]) -> list[dict[str, Any]]:
    return [msgspec.msgpack.decode(message) for message in messages]
