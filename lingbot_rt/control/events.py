"""Event payloads as clients send them -> control events. The only place that looks inside a payload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lingbot_rt.control.actions import TOKENS, Actions, Keys
from lingbot_rt.control.condition_queue import ControlEvent, PromptEvent, ScriptEvent, StateEvent, Transition
from lingbot_rt.errors import InvalidEvent

MAX_PROMPT_CHARACTERS = 8192
_SHOWN = 60


def parse_event(kind: str, payload: object) -> tuple[ControlEvent, ...]:
    """One event message's ``kind`` and ``payload`` -> its control events; a composite gives several.

    Raises InvalidEvent that names the field, the value and what is expected; then nothing may be applied.
    """
    parser = _PARSERS.get(kind)
    if parser is None:
        raise InvalidEvent(
            f"unsupported event kind {_shown(kind)}; expected one of {', '.join(_PARSERS)}", field="kind"
        )
    return parser(payload)


def parse_script(value: object, field: str = "camera_actions") -> Actions:
    """``list[list[str]]``, one list a latent frame -> Actions. Raises InvalidEvent."""
    if not isinstance(value, list | tuple) or not all(isinstance(keys, list | tuple) for keys in value):
        raise InvalidEvent(f"{_shown(value)} is not list[list[str]], one list of keys a latent frame", field=field)
    return tuple(_parse_keys(keys, f"{field}[{i}]") for i, keys in enumerate(value))


def _parse_prompt(payload: object) -> tuple[ControlEvent, ...]:
    if not isinstance(payload, str) or not payload.strip():
        raise InvalidEvent(f"{_shown(payload)} is not a non-empty string", field="prompt")
    if len(payload) > MAX_PROMPT_CHARACTERS:
        raise InvalidEvent(f"{len(payload)} characters are too many, at most {MAX_PROMPT_CHARACTERS}", field="prompt")
    return (PromptEvent(payload),)


def _parse_camera(payload: object) -> tuple[ControlEvent, ...]:
    if not isinstance(payload, dict):
        return (ScriptEvent(parse_script(payload)),)
    if payload.get("mode") != "state":
        raise InvalidEvent(
            f'mode {_shown(payload.get("mode"))}: expected "state", or a list[list[str]] for a script',
            field="camera_actions",
        )
    transitions = payload.get("transitions")
    if not isinstance(transitions, list | tuple):
        raise InvalidEvent(f"{_shown(transitions)} is not a list of transitions", field="camera_actions.transitions")
    return (StateEvent(tuple(_parse_transition(entry, i) for i, entry in enumerate(transitions))),)


def _parse_transition(entry: object, index: int) -> Transition:
    field = f"camera_actions.transitions[{index}]"
    if not isinstance(entry, dict):
        raise InvalidEvent(f"{_shown(entry)} is not a map with actions and client_ts_ms", field=field)
    actions = entry.get("actions")
    if not isinstance(actions, list | tuple):
        raise InvalidEvent(f"{_shown(actions)} is not a list of keys", field=f"{field}.actions")
    return Transition(_parse_keys(actions, f"{field}.actions"), _parse_time(entry.get("client_ts_ms"), field))


def _parse_time(value: object, field: str) -> float | None:
    """Some clients send the time as a string; all that is kept is a number of milliseconds."""
    if value is None:
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass  # the error below names it
    raise InvalidEvent(f"{_shown(value)} is not a time in milliseconds", field=f"{field}.client_ts_ms")


def _parse_keys(keys: Any, field: str) -> Keys:
    for key in keys:
        if key not in TOKENS:
            raise InvalidEvent(f"unknown action {_shown(key)}; valid are {', '.join(TOKENS)}", field=field)
    return tuple(keys)


def _parse_composite(payload: object) -> tuple[ControlEvent, ...]:
    if not isinstance(payload, dict):
        raise InvalidEvent(f"{_shown(payload)} is not a map", field="composite_input")
    kinds = payload.get("input_types")
    if not isinstance(kinds, list | tuple) or not kinds:
        raise InvalidEvent(f"{_shown(kinds)} is not a non-empty list", field="composite_input.input_types")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _SIMPLE_PARSERS:
            expected = ", ".join(_SIMPLE_PARSERS)
            raise InvalidEvent(f"unsupported {_shown(kind)}; expected {expected}", field="composite_input.input_types")
    events: list[ControlEvent] = []
    for kind in dict.fromkeys(kinds):  # naming a part a thousand times parses it once
        if kind not in payload:
            raise InvalidEvent("missing though input_types names it", field=f"composite_input.{kind}")
        events.extend(_SIMPLE_PARSERS[kind](payload[kind]))
    return tuple(events)


def _shown(value: object) -> str:
    """``value`` in a few words, in time and depth that do not grow with it: a client chose it."""
    if isinstance(value, list | tuple | dict) and value:
        kind = "map" if isinstance(value, dict) else "list"
        return f"a {kind} of {len(value)}"
    text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


_SIMPLE_PARSERS: dict[str, Callable[[object], tuple[ControlEvent, ...]]] = {
    "camera_actions": _parse_camera,
    "prompt": _parse_prompt,
}
_PARSERS = _SIMPLE_PARSERS | {"composite_input": _parse_composite}
