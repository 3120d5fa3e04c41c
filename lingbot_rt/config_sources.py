"""Where a configuration is set: defaults < TOML file < environment < flags."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingbot_rt.config import (
    ENV_PREFIX,
    ServeConfig,
    checked_value,
    expected_number,
    parse_value,
    path_of,
    value_type,
)
from lingbot_rt.config_values import environment_value, flag
from lingbot_rt.errors import ConfigError, quoted, reason_of


@dataclass(frozen=True, slots=True)
class Setting:
    """A value of one field and where it was set: a flag, a variable, or a key of the configuration file."""

    value: Any
    source: str


def load_config(
    flags: Mapping[str, Any], *, file: str | None = None, environment: Mapping[str, str] = os.environ
) -> ServeConfig:
    """The configuration from all sources. Arguments and errors as for ``gather_settings``."""
    settings = gather_settings(flags, file=file, environment=environment)
    return ServeConfig(**{name: setting.value for name, setting in settings.items()})


def gather_settings(
    flags: Mapping[str, Any], *, file: str | None = None, environment: Mapping[str, str] = os.environ
) -> dict[str, Setting]:
    """Merges the sources; flags win over the environment, and the environment wins over the TOML ``file``.

    ``flags`` holds only the flags that were given. An empty variable counts as unset.
    Raises ConfigError that names the source, the field, the value and what is valid.
    """
    fields = {field.name: field for field in dataclasses.fields(ServeConfig)}
    settings = {} if file is None else _from_file(path_of(file, "--config"), fields)
    for variable in environment:
        field = fields.get(_field_of(variable))
        text = environment_value(variable, environment)
        if field is not None and text is not None and field.name not in flags:
            settings[field.name] = Setting(_from_variable(field, text, variable), variable)
    settings |= {name: Setting(value, flag(name)) for name, value in flags.items()}
    return {
        name: Setting(checked_value(fields[name], setting.value, source=setting.source), setting.source)
        for name, setting in settings.items()
    }


def unread_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """The variables with the project's prefix that nothing reads, each with the known name that is most like it."""
    known = {ENV_PREFIX + field.name.upper() for field in dataclasses.fields(ServeConfig)}
    return {
        name: _nearest(name, known)
        for name in sorted(environment)
        if name.startswith(ENV_PREFIX) and name not in known and environment_value(name, environment)
    }


def _field_of(variable: str) -> str:
    """``LINGBOT_RT_MODEL_PATH`` -> ``model_path``; empty for a variable without the prefix or in lower case."""
    name = variable.removeprefix(ENV_PREFIX)
    return name.lower() if variable.startswith(ENV_PREFIX) and name.isupper() else ""


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that is most like ``name``, if any is."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return found[0] if found else None


def _from_variable(field: dataclasses.Field[Any], text: str, variable: str) -> Any:
    try:
        return parse_value(field, text, source=variable)
    except ConfigError as error:
        if field.name == "port" and "://" in text:
            raise ConfigError(
                f"{error}; Kubernetes sets this variable for a service named lingbot-rt: "
                "set enableServiceLinks: false in the pod, or pass --port",
                field=field.name,
            ) from None
        raise


def _from_file(path: Path, fields: Mapping[str, dataclasses.Field[Any]]) -> dict[str, Setting]:
    where = f"--config {path}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{where}: {reason_of(error)}", field="config") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of 5,000 digits
        raise ConfigError(f"{where} is not TOML: {error}", field="config") from None
    settings: dict[str, Setting] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            nearest = _nearest(name, fields)
            hint = f"the nearest is {nearest}" if nearest else f"known: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}: unknown key {quoted(key)}; {hint}", field=name)
        if name in settings:
            raise ConfigError(f"{where}: {name} is set twice, with - and with _", field=name)
        kind = value_type(fields[name])
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)):
            shown = "(not shown)" if name == "api_key" else quoted(str(value))
            expected = {str: "a string", bool: "true or false"}.get(kind) or expected_number(fields[name])
            raise ConfigError(f"{where}: {name} = {shown}: expected {expected}", field=name)
        settings[name] = Setting(value, f"{where}: {name}")
    return settings
