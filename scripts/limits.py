"""The tables of limits of ``docs/limits.md``, from the rows of ``limit_rows`` and the numbers in the code.

``scripts/check_docs`` writes the values into the page. Nothing of the package is imported for them: the numbers are
read from the source, so that a page can be checked without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from lingbot_rt.config import ServeConfig
from lingbot_rt.config_values import flag
from lingbot_rt.session.messages import Init
from scripts.limit_rows import LIMITS

PACKAGE = Path(__file__).resolve().parents[1] / "lingbot_rt"

_WORDS = (
    *("MAX", "MIN", "LIMIT", "TIMEOUT", "GRACE", "PATIENCE", "WAITING", "PENDING", "BYTES", "THREADS", "BACKLOG"),
    *("DEPTH", "RANGE", "S", "TRIES", "PIXELS", "SIDE", "SIDES", "PARTS", "SCANS", "BLOCKS", "SHOWN", "LISTED", "KEPT"),
    *("CACHED", "PERIOD", "LENGTH", "DESCRIPTORS", "CHUNKS", "SHAPES", "PROMPTS", "EVENTS", "REDIRECTS", "BATCH"),
)
BOUND_LIKE = re.compile(rf"(?:^|_)(?:{'|'.join(_WORDS)})(?:_|$)")
"""Names of constants that are limits, unless ``NOT_LIMITS`` says why not."""

QUEUES = ("DaemonPool", "ThreadPoolExecutor", "Queue", "deque", "lru_cache")
"""Calls whose first whole number, or ``maxlen``, ``maxsize`` or ``max_workers``, is a limit."""


def table(section: str) -> str:
    """The rows of a section in Markdown. Raises ValueError when there is no such section."""
    if section not in LIMITS:
        raise ValueError(f"there is no section of limits {section!r}")
    rows = [
        f"| {limit.what} | {in_words(value_of(limit.source), limit.unit)} | {limit.shown_source} | {limit.beyond} |"
        for limit in LIMITS[section]
    ]
    return "\n".join(["| limit | value | set by | beyond it |", "|---|---|---|---|", *rows]) + "\n"


def listed() -> set[str]:
    """The sources of all rows."""
    return {limit.source for rows in LIMITS.values() for limit in rows}


def value_of(source: str) -> Any:
    """The number behind a row's source, its default for a flag, its range for a field of an init."""
    if source.startswith("--"):
        (field,) = (field for field in dataclasses.fields(ServeConfig) if flag(field.name) == source)
        low, high = field.metadata["low"], field.metadata["high"]
        return {"default": field.default, "from": low, "to": high}
    if source.startswith("init."):
        return _range_of(source.removeprefix("init."))
    module, _, name = source.partition(":")
    found = constants(module) | queues(module)
    if name not in found:
        raise ValueError(f"{source} is not in the code")
    return found[name]


def _range_of(name: str) -> dict[str, Any]:
    (field,) = (field for field in msgspec.structs.fields(Init) if field.name == name)
    hint = field.type
    while not hasattr(hint, "__metadata__"):
        hint = hint.__args__[0]  # of ``X | None``
    meta = hint.__metadata__[0]
    return {"from": meta.ge, "to": meta.le if meta.max_length is None else meta.max_length}


def in_words(value: Any, unit: str) -> str:
    """``1048576, "bytes"`` -> ``1 MiB``."""
    if isinstance(value, dict) and "to" in value:
        high = in_words(value["to"], "")
        span = high if value["from"] is None else f"{in_words(value['from'], '')} to {high}"
        if "default" not in value:
            return f"{span} {unit}".strip()
        default = "not set" if value["default"] is None else in_words(value["default"], unit)
        return f"{default} ({span})"
    if isinstance(value, dict):
        return f"{', '.join(f'{name} {number:,}' for name, number in value.items())} {unit}"
    if isinstance(value, tuple):
        return " to ".join(in_words(part, unit) for part in value)
    if unit == "bytes":
        for size, name in ((2**20, "MiB"), (2**10, "KiB"), (10**6, "MB")):
            if value % size == 0:
                return f"{value // size} {name}"
    if value >= 2**32 - 1:
        exponent = value.bit_length() - (value & (value - 1) == 0)
        return f"2^{exponent}{'' if value == 2**exponent else ' - 1'} {unit}".strip()
    number = f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return f"{number} {unit}".strip()


def bound_like() -> set[str]:
    """Every constant, queue and flag of the package that looks like a limit."""
    found = {flag(field.name) for field in dataclasses.fields(ServeConfig) if field.metadata["high"] is not None}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.startswith(("bench.", "regression.")):  # commands of a developer
            continue
        found |= {f"{module}:{name}" for name in constants(module) if BOUND_LIKE.search(name)}
        found |= {f"{module}:{name}" for name in _named_queues(module)}
        found |= {f"{module}:{name}" for name in queues(module)}
    return found


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


@cache
def constants(module: str) -> dict[str, Any]:
    """Name -> value of the module's constants that are numbers, pairs or tables of numbers."""
    known: dict[str, Any] = {}
    for node in _tree(module).body:
        match node:
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
                for name, part in zip(names, values, strict=False):
                    number = _number(part, known)
                    if isinstance(name, ast.Name) and number is not None:
                        known[name.id] = number
    return known


def _number(node: ast.expr, known: dict[str, Any]) -> Any:
    """The value of arithmetic with numbers and earlier constants; None for anything else."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return node.value
        case ast.Name(id=name):
            return known.get(name)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _number(left, known), _number(right, known)
            signs = {ast.Mult: "__mul__", ast.Pow: "__pow__", ast.Add: "__add__", ast.Sub: "__sub__"}
            return None if type(op) not in signs or None in (a, b) else getattr(a, signs[type(op)])(b)
        case ast.Tuple(elts=elements) if elements and all(_number(part, known) is not None for part in elements):
            return tuple(_number(part, known) for part in elements)
        case ast.Dict(keys=keys, values=values) if keys and all(isinstance(key, ast.Constant) for key in keys):
            numbers = [_number(value, known) for value in values]
            return (
                None
                if None in numbers
                else {ast.literal_eval(key): n for key, n in zip(keys, numbers, strict=True) if key}
            )
        case ast.Call(func=func):
            return _size(node) if ast.unparse(func) in QUEUES else None
    return None


@cache
def queues(module: str) -> dict[str, int]:
    """Kind -> size of the module's queues, pools and caches that are no constant of their own."""
    named = {id(call) for call in _named_queues(module).values()}
    found: dict[str, int] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and id(node) not in named:
            kind = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            size = _size(node)
            if kind in QUEUES and size is not None:
                found.setdefault(kind, size)
    return found


def _named_queues(module: str) -> dict[str, ast.Call]:
    """The queues, pools and caches that are constants of the module, by name."""
    return {
        node.targets[0].id: node.value
        for node in _tree(module).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in QUEUES
        and _size(node.value) is not None
    }


def _size(call: ast.Call) -> int | None:
    """The whole number in a call that sizes a queue."""
    given = [*call.args, *(word.value for word in call.keywords)]
    return next((part.value for part in given if isinstance(part, ast.Constant) and type(part.value) is int), None)
