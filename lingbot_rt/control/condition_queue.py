"""Events in, the next chunk's conditions out: held keys, scripts and prompts.

Keys come in two forms that replace each other. A script is a fixed list, one entry a latent frame, neutral once it is
used up. State is what a player holds: the newest transition is held on, and a tap that came and went between two
chunks still gets one latent frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lingbot_rt.control.actions import NEUTRAL, Actions, Keys

MAX_PENDING = 512
"""Script frames or transitions that may wait; the newest are kept."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The keys held from a moment on."""

    actions: Keys
    client_ts_ms: float | None = None


@dataclass(frozen=True, slots=True)
class PromptEvent:
    prompt: str


@dataclass(frozen=True, slots=True)
class ScriptEvent:
    actions: Actions


@dataclass(frozen=True, slots=True)
class StateEvent:
    transitions: tuple[Transition, ...]


ControlEvent = PromptEvent | ScriptEvent | StateEvent


@dataclass(frozen=True, slots=True)
class Conditions:
    """What one chunk runs with."""

    prompt: str
    prompt_updated: bool
    camera_actions: Actions | None  # one entry a latent frame; None: the session never asked for camera control
    event_id: int | None  # newest event whose effect is in this chunk


@dataclass(frozen=True, slots=True)
class _Frame:
    """Keys of one latent frame and the event they came from."""

    keys: Keys
    event_id: int | None


class ConditionQueue:
    """One session's pending control. ``apply`` whenever events arrive, ``sample`` once a chunk."""

    def __init__(self, prompt: str, script: Actions | None = None) -> None:
        self._prompt = prompt
        self._next_prompt: tuple[str, int | None] | None = None
        self._samples = 0
        self.clear()
        if script is not None:
            self.apply([ScriptEvent(script)], None)

    @property
    def pending(self) -> int:
        """Script frames and transitions not sampled yet."""
        return len(self._script) + len(self._transitions)

    def clear(self) -> None:
        """Forgets keys, scripts and waiting prompts; the prompt in force stays."""
        self._next_prompt = None
        self._script: deque[_Frame] = deque(maxlen=MAX_PENDING)
        self._transitions: deque[_Frame] = deque(maxlen=MAX_PENDING)
        self._held: _Frame | None = None
        self._event_id: int | None = None

    def apply(self, events: Sequence[ControlEvent], event_id: int | None) -> None:
        """Takes validated events; those of one composite message come together and share their id."""
        for event in events:
            match event:
                case PromptEvent(prompt):
                    self._next_prompt = (prompt, event_id)
                case ScriptEvent(actions):
                    self._transitions.clear()
                    self._script.clear()
                    self._script.extend(_Frame(keys, event_id) for keys in actions)
                    self._held = _Frame(NEUTRAL, None)
                case StateEvent(transitions):
                    self._script.clear()
                    self._transitions.extend(_Frame(transition.actions, event_id) for transition in transitions)

    def sample(self, num_latent_frames: int) -> Conditions:
        """Consumes what the next chunk of ``num_latent_frames`` uses. A prompt is in force from the second chunk on."""
        updated = False
        if self._next_prompt is not None and self._samples > 0:
            self._prompt, self._event_id = self._next_prompt
            self._next_prompt = None
            updated = True
        self._samples += 1
        frames = self._sample_keys(num_latent_frames)
        if frames:
            self._event_id = frames[-1].event_id
        actions = tuple(frame.keys for frame in frames) or None
        return Conditions(self._prompt, updated, actions, self._event_id)

    def _sample_keys(self, count: int) -> list[_Frame]:
        if count <= 0:
            return []
        if self._script:
            frames = [self._script.popleft() for _ in range(min(count, len(self._script)))]
            # The padding carries the script's id: the chunk is still the script's doing.
            return frames + [_Frame(NEUTRAL, frames[-1].event_id)] * (count - len(frames))
        if not self._transitions:
            return [] if self._held is None else [self._held] * count
        last = self._transitions[-1]
        tap = next((frame for frame in reversed(self._transitions) if frame.keys), last)
        self._transitions.clear()
        self._held = last
        if tap.keys == last.keys:
            return [last] * count
        return [tap] + [last] * (count - 1)
