"""Many measurements -> the few numbers that are told, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a row of measurements, in their unit. Percentiles are interpolated between neighbours."""

    mean: float
    p50: float
    p95: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError when there is nothing to tell."""
        if not values:
            raise ValueError("no measurement")
        p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
        return cls(mean=float(np.mean(values)), p50=p50, p95=p95, p99=p99, count=len(values))


def spread_of(values: Sequence[float]) -> Spread | None:
    """None where nothing was measured."""
    return Spread.of(values) if values else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the numbers to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None, digits: int = 1) -> str:
    """A cell of a table; a dash where there is nothing to tell."""
    return "-" if value is None else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """A cell for what may be 500 or 0.0005."""
    return "-" if value is None else f"{value:.4g}"


def write_json(path: str | None, report: Any) -> None:
    """A dataclass as an indented JSON object in the file ``path``, if one is asked for."""
    if path is not None:
        Path(path).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
