"""Control events in, the conditions of the next chunk out: held keys, scripts, camera poses and prompts.

The camera is moved in three forms that replace each other. A script is a fixed list of keys with one entry per latent
frame; after its end no key is held. A path is the same with poses instead of keys. State is what a player holds: the
newest transition is held until the next one, and a key that was pressed and released between two chunks still moves one
latent frame.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lingbot_rt.errors import InvalidEvent
from lingbot_rt.session.camera_poses import CameraPose, PosesEvent, parse_poses
from lingbot_rt.session.messages import MAX_PROMPT_CHARACTERS
from lingbot_rt.session.session_state import FrameState, NextPrompt, PathTable, QueueState, SentEvent, WaitingState
from lingbot_rt.session.shown import shown

TOKENS = ("w", "a", "s", "d", "i", "j", "k", "l")

Keys = tuple[str, ...]
"""Keys held together."""

Actions = tuple[Keys, ...]
"""The keys of consecutive latent frames."""

Moves = tuple[Keys | CameraPose, ...]
"""What moves the camera in consecutive latent frames."""

NEUTRAL: Keys = ()

MAX_PENDING = 512
"""Most latent frames of a script or path, and most transitions that wait for a chunk; of those the newest are kept."""

MAX_WAITING = 2 * MAX_PENDING
"""Most events that wait for a chunk to sample them. Of more, those that newer ones replaced are dropped."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The keys held from a moment on."""

    actions: Keys
    client_ts_ms: float | None = None


@dataclass(frozen=True, slots=True)
class PromptEvent:
    prompt: str
    recache: bool | None = None  # whether the window is computed again for it; None: as the session's init says


@dataclass(frozen=True, slots=True)
class ScriptEvent:
    actions: Actions


@dataclass(frozen=True, slots=True)
class StateEvent:
    transitions: tuple[Transition, ...]


ControlEvent = PromptEvent | ScriptEvent | StateEvent | PosesEvent


@dataclass(frozen=True, slots=True)
class Received:
    """One event as it arrived. Ids are the client's and may repeat or start anywhere; the order is the session's."""

    order: int  # 0, 1, 2 ... through the session
    event_id: int | None
    at: float  # seconds on the caller's clock


@dataclass(frozen=True, slots=True)
class Conditions:
    """What one chunk runs with."""

    prompt: str
    camera_actions: Moves | None  # one entry per latent frame; None: the session never asked for camera control
    event_id: int | None  # of the newest event in force that has an id, whatever its kind
    recache: bool | None  # of the prompt event that came into force with this chunk; None: none, or it does not say
    sampled: tuple[Received, ...]  # events that this chunk is the first to sample, in order of arrival


@dataclass(frozen=True, slots=True)
class _Frame:
    """What moves the camera in one latent frame, and the event it came from; None: no event holds it."""

    move: Keys | CameraPose
    event: Received | None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An event that no chunk has sampled yet."""

    event: Received
    is_prompt: bool  # nothing but a prompt


class ConditionQueue:
    """One session's pending control. ``apply`` takes events as they arrive, ``sample`` is called once per chunk."""

    def __init__(self, prompt: str, script: Moves | None = None) -> None:
        self._prompt = prompt
        self._prompt_event: Received | None = None  # the one that set the prompt in force
        self._next_prompt: tuple[PromptEvent, Received] | None = None
        self._script: deque[_Frame] = deque(maxlen=MAX_PENDING)
        self._transitions: deque[_Frame] = deque(maxlen=MAX_PENDING)
        self._held: _Frame | None = None
        self._keys_event: Received | None = None  # the one whose keys the newest sample ends with
        self._newest_keys = -1  # order of the newest event that holds keys or a script
        self._waiting: list[_Waiting] = []
        self._num_received = 0
        self._num_samples = 0
        if script is not None:
            self._play(script, None)

    @property
    def pending(self) -> int:
        """Frames of a script or path, and transitions, that are not sampled yet."""
        return len(self._script) + len(self._transitions)

    def apply(self, events: Sequence[ControlEvent], event_id: int | None, at: float = 0.0) -> tuple[Received, ...]:
        """Takes the validated parts of one event message, which share its id and its time of arrival ``at``.

        Returns the events that no chunk will sample because too many newer ones came.
        """
        received = Received(self._num_received, event_id, at)
        self._num_received += 1
        for event in events:
            match event:
                case PromptEvent():
                    self._next_prompt = (event, received)
                case ScriptEvent(actions):
                    self._play(actions, received)
                    self._newest_keys = received.order
                case PosesEvent():
                    self._play(event.moves, received)
                    self._newest_keys = received.order
                case StateEvent(transitions):
                    self._script.clear()
                    self._transitions.extend(_Frame(transition.actions, received) for transition in transitions)
                    self._newest_keys = received.order
        self._waiting.append(_Waiting(received, is_prompt=all(isinstance(event, PromptEvent) for event in events)))
        return self._drop_replaced() if len(self._waiting) > MAX_WAITING else ()

    @property
    def prompt_in_force(self) -> tuple[str, SentEvent | None]:
        """The prompt of the newest sample, and the event that set it."""
        return self._prompt, _sent(self._prompt_event)

    def go_back(self, prompt: str, prompt_event: SentEvent | None, num_samples: int) -> tuple[Received, ...]:
        """Puts an older prompt in force, as after ``num_samples`` samples. Keys that are held now stay held.

        A script, a path and prompts that wait are forgotten. Returns the events that no chunk will sample for that.
        """
        self._prompt, self._prompt_event = prompt, _received(prompt_event)
        self._next_prompt = None
        self._script.clear()
        self._num_samples = num_samples
        frames = [*self._transitions, *([self._held] if self._held else [])]
        alive = {frame.event.order for frame in frames if frame.event is not None}
        return self._drop_all_but(alive)

    def state(self, paths: PathTable) -> QueueState:
        """Everything that waits and that is in force. Adds the paths that wait to ``paths``."""
        waiting = tuple(WaitingState(_told(entry.event), entry.is_prompt) for entry in self._waiting)
        return QueueState(
            prompt=self._prompt,
            prompt_event=_sent(self._prompt_event),
            next_prompt=None if self._next_prompt is None else _next_prompt(*self._next_prompt),
            script=tuple(_frame_state(frame, paths) for frame in self._script),
            transitions=tuple(_frame_state(frame, paths) for frame in self._transitions),
            held=None if self._held is None else _frame_state(self._held, paths),
            keys_event=_sent(self._keys_event),
            newest_keys=self._newest_keys,
            waiting=waiting,
            num_received=self._num_received,
            num_samples=self._num_samples,
        )

    @classmethod
    def restored(cls, state: QueueState, paths: PathTable, at: float) -> ConditionQueue:
        """``at``: when what waits counts as arrived. Raises InvalidInit for a pose that ``paths`` does not have."""
        it = cls(state.prompt)
        it._prompt_event = _received(state.prompt_event)
        if state.next_prompt is not None:
            entry = state.next_prompt
            it._next_prompt = (PromptEvent(entry.prompt, entry.recache), _arrived(entry.event, at))
        it._script.extend(_frame(frame, paths, at) for frame in state.script)
        it._transitions.extend(_frame(frame, paths, at) for frame in state.transitions)
        it._held = None if state.held is None else _frame(state.held, paths, at)
        it._keys_event = _received(state.keys_event)
        it._newest_keys = state.newest_keys
        it._waiting = [_Waiting(_arrived(entry.event, at), entry.is_prompt) for entry in state.waiting]
        it._num_received, it._num_samples = state.num_received, state.num_samples
        return it

    def abandon(self) -> tuple[Received, ...]:
        """The events that still wait, once no chunk will come."""
        waiting, self._waiting = self._waiting, []
        return tuple(entry.event for entry in waiting)

    def sample(self, num_latent_frames: int) -> Conditions:
        """Consumes what the next chunk uses. A prompt event is in force from the second chunk on."""
        recache = None
        if self._next_prompt is not None and self._num_samples > 0:
            (event, self._prompt_event), self._next_prompt = self._next_prompt, None
            self._prompt, recache = event.prompt, event.recache
        self._num_samples += 1
        frames = self._sample_keys(num_latent_frames)
        if frames:
            self._keys_event = frames[-1].event
        in_force = [event for event in (self._prompt_event, self._keys_event) if event and event.event_id is not None]
        return Conditions(
            prompt=self._prompt,
            camera_actions=tuple(frame.move for frame in frames) or None,
            event_id=max(in_force, key=lambda event: event.order).event_id if in_force else None,
            recache=recache,
            sampled=self._take_sampled(),
        )

    def _play(self, script: Moves, event: Received | None) -> None:
        self._transitions.clear()
        self._script.clear()
        self._script.extend(_Frame(move, event) for move in script)
        self._held = _Frame(NEUTRAL, None)

    def _sample_keys(self, count: int) -> list[_Frame]:
        if self._script:
            frames = [self._script.popleft() for _ in range(min(count, len(self._script)))]
            # The padding carries the script's id: the chunk is still the script's doing.
            return frames + [_Frame(NEUTRAL, frames[-1].event)] * (count - len(frames))
        if not self._transitions:
            return [] if self._held is None else [self._held] * count
        last = self._transitions[-1]
        # A key that was pressed and released between two chunks still moves one latent frame.
        tap = next((frame for frame in reversed(self._transitions) if _keys_of(frame) - _keys_of(last)), last)
        self._transitions.clear()
        self._held = last
        return [tap, *[last] * (count - 1)]

    def _take_sampled(self) -> tuple[Received, ...]:
        """The waiting events that are sampled now, those that a newer one replaced included."""
        prompts = self._prompt_event.order if self._prompt_event else -1
        keys = self._newest_keys
        held = self._held.event if self._held else None
        if self._keys_event and held and self._keys_event.order < held.order:
            # In a chunk of one latent frame a tap stands alone; the transition behind it comes with the next chunk.
            keys = self._keys_event.order
        taken: list[_Waiting] = []
        left: list[_Waiting] = []
        for waiting in self._waiting:
            newest = prompts if waiting.is_prompt else keys
            # A composite whose prompt is in force is sampled, also where a tap before it holds its keys back.
            is_taken = waiting.event.order <= newest or waiting.event.order == prompts
            (taken if is_taken else left).append(waiting)
        self._waiting = left
        return tuple(waiting.event for waiting in taken)

    def _drop_replaced(self) -> tuple[Received, ...]:
        """Lets go of the waiting events of which nothing is left to sample. At most ``MAX_PENDING`` + 3 have more."""
        frames = [*self._script, *self._transitions, *([self._held] if self._held else [])]
        alive = {frame.event.order for frame in frames if frame.event is not None} | {self._newest_keys}
        if self._next_prompt is not None:
            alive.add(self._next_prompt[1].order)
        return self._drop_all_but(alive)

    def _drop_all_but(self, alive: set[int]) -> tuple[Received, ...]:
        dropped = tuple(entry.event for entry in self._waiting if entry.event.order not in alive)
        self._waiting = [entry for entry in self._waiting if entry.event.order in alive]
        return dropped


# --- what waits <-> a state ---


def _told(event: Received) -> SentEvent:
    return SentEvent(event.order, event.event_id)


def _sent(event: Received | None) -> SentEvent | None:
    return None if event is None else _told(event)


def _arrived(event: SentEvent, at: float) -> Received:
    return Received(event.order, event.event_id, at)


def _received(event: SentEvent | None) -> Received | None:
    """Of an event that was sampled: nobody asks any more when it arrived."""
    return None if event is None else _arrived(event, 0.0)


def _next_prompt(event: PromptEvent, received: Received) -> NextPrompt:
    return NextPrompt(event.prompt, event.recache, _told(received))


def _frame_state(frame: _Frame, paths: PathTable) -> FrameState:
    event = _sent(frame.event)
    if isinstance(frame.move, CameraPose):
        return FrameState(event, (), paths.place_of(frame.move.path), frame.move.index)
    return FrameState(event, cast(Any, frame.move))


def _frame(state: FrameState, paths: PathTable, at: float) -> _Frame:
    event = None if state.event is None else _arrived(state.event, at)
    if state.path is None:
        return _Frame(state.keys, event)
    return _Frame(paths.pose(state.path, state.index), event)


def _keys_of(frame: _Frame) -> set[str]:
    return set() if isinstance(frame.move, CameraPose) else set(frame.move)


# --- payloads as clients send them <-> control events ---


def parse_event(kind: str, payload: object) -> tuple[ControlEvent, ...]:
    """One event message's ``kind`` and ``payload`` -> its control events; a composite gives several.

    Raises InvalidEvent that names the field, the value and what is expected; then nothing may be applied.
    """
    parser = _PARSERS.get(kind)
    if parser is None:
        raise InvalidEvent(f"unsupported event kind {shown(kind)}; expected one of {', '.join(_PARSERS)}", field="kind")
    return parser(payload)


def parse_script(value: object, field: str = "camera_actions") -> Actions:
    """``list[list[str]]``, one list per latent frame -> Actions. Raises InvalidEvent."""
    if not isinstance(value, list | tuple) or not all(isinstance(keys, list | tuple) for keys in value):
        raise InvalidEvent(f"{shown(value)} is not list[list[str]], one list of keys per latent frame", field=field)
    if len(value) > MAX_PENDING:
        raise InvalidEvent(f"{len(value)} latent frames are too many, at most {MAX_PENDING}", field=field)
    return tuple(_parse_keys(keys, f"{field}[{i}]") for i, keys in enumerate(value))


def _parse_prompt(payload: object) -> tuple[ControlEvent, ...]:
    recache = None
    if isinstance(payload, dict):
        recache, payload = payload.get("recache"), payload.get("prompt")
        if not isinstance(recache, bool | None):
            raise InvalidEvent(f"{shown(recache)}, expected true or false", field="prompt.recache")
    if not isinstance(payload, str) or not payload.strip():
        raise InvalidEvent(f"{shown(payload)} is not a non-empty string", field="prompt")
    if len(payload) > MAX_PROMPT_CHARACTERS:
        raise InvalidEvent(f"{len(payload)} characters are too many, at most {MAX_PROMPT_CHARACTERS}", field="prompt")
    return (PromptEvent(payload, recache),)


def _parse_camera(payload: object) -> tuple[ControlEvent, ...]:
    if not isinstance(payload, dict):
        return (ScriptEvent(parse_script(payload)),)
    if payload.get("mode") != "state":
        raise InvalidEvent(
            f'mode {shown(payload.get("mode"))}: expected "state", or a list[list[str]] for a script',
            field="camera_actions",
        )
    transitions = payload.get("transitions")
    if not isinstance(transitions, list | tuple):
        raise InvalidEvent(f"{shown(transitions)} is not a list of transitions", field="camera_actions.transitions")
    parsed = [_parse_transition(entry, i) for i, entry in enumerate(transitions)]
    return (StateEvent(tuple(parsed[-MAX_PENDING:])),)


def _parse_poses(payload: object) -> tuple[ControlEvent, ...]:
    return (parse_poses(payload, MAX_PENDING),)


def _parse_transition(entry: object, index: int) -> Transition:
    field = f"camera_actions.transitions[{index}]"
    if not isinstance(entry, dict):
        raise InvalidEvent(f"{shown(entry)} is not a map with actions and client_ts_ms", field=field)
    actions = entry.get("actions")
    if not isinstance(actions, list | tuple):
        raise InvalidEvent(f"{shown(actions)} is not a list of keys", field=f"{field}.actions")
    return Transition(_parse_keys(actions, f"{field}.actions"), _parse_time(entry.get("client_ts_ms"), field))


def _parse_time(value: object, field: str) -> float | None:
    """Some clients send the time as a string; all that is kept is a number of milliseconds."""
    if value is None:
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            pass  # the error below names it
        else:
            return number if math.isfinite(number) else None
    raise InvalidEvent(f"{shown(value)} is not a time in milliseconds", field=f"{field}.client_ts_ms")


def _parse_keys(keys: Any, field: str) -> Keys:
    for key in keys:
        if key not in TOKENS:
            raise InvalidEvent(f"unknown action {shown(key)}; valid are {', '.join(TOKENS)}", field=field)
    return tuple(keys)


def _parse_composite(payload: object) -> tuple[ControlEvent, ...]:
    if not isinstance(payload, dict):
        raise InvalidEvent(f"{shown(payload)} is not a map", field="composite_input")
    kinds = payload.get("input_types")
    if not isinstance(kinds, list | tuple) or not kinds:
        raise InvalidEvent(f"{shown(kinds)} is not a non-empty list", field="composite_input.input_types")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _SIMPLE_PARSERS:
            expected = ", ".join(_SIMPLE_PARSERS)
            raise InvalidEvent(f"unsupported {shown(kind)}; expected {expected}", field="composite_input.input_types")
    events: list[ControlEvent] = []
    for kind in dict.fromkeys(kinds):  # naming a part a thousand times parses it once
        if kind not in payload:
            raise InvalidEvent("missing though input_types names it", field=f"composite_input.{kind}")
        events.extend(_SIMPLE_PARSERS[kind](payload[kind]))
    return tuple(events)


_SIMPLE_PARSERS: dict[str, Callable[[object], tuple[ControlEvent, ...]]] = {
    "camera_actions": _parse_camera,
    "prompt": _parse_prompt,
    "camera_poses": _parse_poses,
}
_PARSERS = {"camera_actions": _parse_camera, "prompt": _parse_prompt, "composite_input": _parse_composite}
_PARSERS |= _SIMPLE_PARSERS


def payload_of(events: Sequence[ControlEvent]) -> tuple[str, Any]:
    """Parsed events -> the kind and payload that parse to them again, without what else the client's payload held."""
    parts: dict[str, Any] = {}
    for event in events:
        match event:
            case PromptEvent(prompt, recache):
                parts["prompt"] = prompt if recache is None else {"prompt": prompt, "recache": recache}
            case ScriptEvent(actions):
                parts["camera_actions"] = [list(keys) for keys in actions]
            case StateEvent(transitions):
                entries = [
                    {"actions": list(entry.actions), "client_ts_ms": entry.client_ts_ms} for entry in transitions
                ]
                parts["camera_actions"] = {"mode": "state", "transitions": entries}
            case PosesEvent():
                parts["camera_poses"] = event.payload
    if len(parts) > 1:
        return "composite_input", {"input_types": list(parts), **parts}
    return next(iter(parts.items()))
