"""Which few-step schedule a model was distilled for: what its files say, else its name, else the first model's.

A schedule is a shift and the timesteps before the shift. Models of the hub seldom state theirs: the scheduler in their
folder is that of the model they were distilled from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lingbot_rt.errors import quoted
from lingbot_rt.models.json_file import JsonFile, list_of, number, text, whole

Values = tuple[float, tuple[int, ...]]
"""Shift, and the timesteps before it."""

SCHEDULES: dict[str, Values] = {"v1": (10.0, (1000, 821, 642, 321)), "v2": (5.0, (1000, 750, 500, 250))}
"""Of LingBot-World-Fast and of LingBot-World 2.0."""

_FIRST = "v1"

_NAMES = {
    "v2": re.compile(r"lingbot-?(world)?(-?2(-|$)|-?v2(-|$)|-(.*-)?(v2|infinity)(-|$))"),
    "v1": re.compile(r"lingbot-?(world)?(-?v1(-|$)|-(.*-)?(v1|fast)(-|$))"),
}
"""Names of repositories and folders, in small letters and with - for every other sign. The first match counts."""

_SHIFT = number(above=0, high=1000)
_STEPS = list_of(whole(1, 1000), 1, 1000)


@dataclass(frozen=True, slots=True)
class DistilledSchedule:
    """The schedule of one model, and why it is this one."""

    shift: float
    steps: tuple[int, ...]
    reason: str
    assumed: bool = False  # neither the files nor the name say it

    def __str__(self) -> str:
        """One line, for example ``schedule v2: shift 5, steps 1000, 750, 500, 250 (by the name ...)``."""
        name = next((f" {name}" for name, values in SCHEDULES.items() if values == (self.shift, self.steps)), "")
        return f"schedule{name}: shift {self.shift:g}, steps {', '.join(map(str, self.steps))} ({self.reason})"


def find_schedule(folder: Path, names: Iterable[str], asked: str = "auto") -> DistilledSchedule:
    """The schedule of the model in ``folder``.

    ``names``: what the model is called, the best name first. ``asked``: a name of SCHEDULES, which wins, or ``auto``.
    Raises CheckpointError for a value of another kind in the folder's files, even if another one is taken.
    """
    scheduler = JsonFile(folder / "scheduler" / "scheduler_config.json", optional=True)
    transformer = JsonFile(folder / "transformer" / "config.json", optional=True)
    index = JsonFile(folder / "model_index.json", optional=True)
    # The scheduler's flow_shift is not read: it belongs to the many-step scheduler of the model before distillation.
    stated = _stated(scheduler, "shift") or _stated(transformer, "flow_shift")
    if asked != "auto":
        against = stated and (stated.shift, stated.steps) != SCHEDULES[asked]
        return _known(asked, f"--schedule {asked}" + (f", against {stated.where}" if stated and against else ""))
    steps = stated.steps if stated else None
    if stated and steps and stated.shift is not None:
        return DistilledSchedule(stated.shift, steps, f"from {stated.where}")
    if stated and steps:
        for version, (_, known_steps) in SCHEDULES.items():
            if steps == known_steps:
                return _known(version, f"by the steps in {stated.where}")
    origins = [file.get("_name_or_path", text("a text", lambda name: True), "") for file in (index, transformer)]
    for name in (*names, *origins):
        version_or_none = version_of(name)
        if version_or_none is not None:
            return _known(version_or_none, f"by the name {quoted(name)}", steps)
    if stated and not steps:
        for version, (known_shift, _) in SCHEDULES.items():
            if stated.shift == known_shift:
                return _known(version, f"by the shift in {stated.where}")
    reason = "assumed: neither the model's files nor its name say which; --schedule v1 or v2 does"
    return _known(_FIRST, reason, steps, assumed=True)


def _known(
    version: str, reason: str, steps: tuple[int, ...] | None = None, *, assumed: bool = False
) -> DistilledSchedule:
    """A schedule of SCHEDULES. ``steps``: the model's own, if its files say them without a shift."""
    shift, known_steps = SCHEDULES[version]
    return DistilledSchedule(shift, steps or known_steps, reason, assumed)


def version_of(name: str) -> str | None:
    """``robbyant/lingbot-world-v2-14b-causal-fast-diffusers`` -> ``v2``; None for a name that does not say it."""
    last = re.sub(r"[^a-z0-9]+", "-", name.rstrip("/").rpartition("/")[2].lower())
    return next((version for version, pattern in _NAMES.items() if pattern.search(last)), None)


@dataclass(frozen=True, slots=True)
class _Stated:
    """What one file says."""

    shift: float | None
    steps: tuple[int, ...] | None
    where: str


def _stated(file: JsonFile, shift_key: str) -> _Stated | None:
    """None for a file without shift and steps. Raises CheckpointError."""
    shift, steps = file.get(shift_key, _SHIFT), file.get("dmd_denoising_steps", _STEPS)
    if steps is not None and steps != sorted(set(steps), reverse=True):
        file.refuse("dmd_denoising_steps", "timesteps from high to low, each once")
    if shift is None and steps is None:
        return None
    return _Stated(shift, None if steps is None else tuple(steps), f"{file.path.parent.name}/{file.path.name}")
