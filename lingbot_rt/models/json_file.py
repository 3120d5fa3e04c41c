"""JSON files of a model. Each value is checked when it is read: errors name file, key, value and what is expected."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lingbot_rt.models.file_checks import broken, require_file, shorten, system_error


class Value(NamedTuple):
    """What a value of a JSON file has to be."""

    expected: str
    read: Callable[[Any], Any]  # the value as the loader uses it; raises ValueError for any other


def whole(low: int, high: int, multiple: int = 1) -> Value:
    """A whole number. A float without a fraction is one too."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise ValueError
        if not low <= value <= high or value % multiple:
            raise ValueError
        return int(value)

    kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
    return Value(f"{kind} from {low} to {high}", read)


def number(*, above: float | None = None, low: float | None = None, high: float | None = None) -> Value:
    """A finite number above ``above``, from ``low`` and up to ``high``, where they are given."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if (above is not None and value <= above) or (low is not None and value < low):
            raise ValueError
        if high is not None and value > high:
            raise ValueError
        return float(value)

    limits = (("above", above), ("from", low), ("up to" if low is None else "to", high))
    return Value(" ".join(["a number", *(f"{word} {limit:g}" for word, limit in limits if limit is not None)]), read)


def flag() -> Value:
    return one_of((True, False), "true or false")


def one_of(choices: tuple[Any, ...], expected: str) -> Value:
    def read(value: Any) -> Any:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise ValueError

    return Value(expected, read)


def text(expected: str, accepts: Callable[[str], bool]) -> Value:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not accepts(value):
            raise ValueError
        return value

    return Value(expected, read)


def nullable(value: Value) -> Value:
    return Value(f"{value.expected}, or null", lambda given: None if given is None else value.read(given))


def list_of(item: Value, low: int, high: int) -> Value:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise ValueError
        return [item.read(element) for element in value]

    count = str(low) if low == high else f"{low} to {high}"
    return Value(f"a list of {count} values, each {item.expected}", read)


class JsonFile:
    """An object of a JSON file. Its values are checked when they are read."""

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        """Raises CheckpointError. ``optional``: a file that does not exist is an empty object."""
        self.path = path
        self.values: dict[str, Any] = {}
        if optional and not os.path.lexists(path):
            return
        require_file(path)
        try:
            # Editors on Windows put a byte order mark before the text.
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise system_error(path, error) from None
        except UnicodeDecodeError:
            raise broken(f"{path} is not JSON in UTF-8: fetch it again") from None
        except ValueError as error:
            raise broken(f"{path} is not JSON: {error}: fetch it again") from None
        except RecursionError:
            raise broken(f"{path} is nested too deep, expected a JSON object: fetch it again") from None
        if not isinstance(values, dict):
            raise broken(f"{path} has {as_json(values)}, expected a JSON object: fetch it again")
        self.values = values

    def get(self, key: str, value: Value, default: Any = None) -> Any:
        """``default`` when the file does not have the key. Raises CheckpointError for a value of another kind."""
        if key not in self.values:
            return default
        try:
            return value.read(self.values[key])
        except (ValueError, OverflowError):
            self.refuse(key, value.expected)

    def take(self, kinds: dict[str, Value]) -> dict[str, Any]:
        """The values that the file has of ``kinds``. Raises CheckpointError."""
        return {key: self.get(key, kind) for key, kind in kinds.items() if key in self.values}

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise broken(f"{self.path}: {key} is {as_json(self.values.get(key))}, expected {expected}")


def as_json(value: Any) -> str:
    return shorten(json.dumps(value))
