"""Statistics of measurements, as table cells and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """Statistics of a list of measurements, in their unit. Percentiles are linearly interpolated."""

    mean: float
    p50: float
    p95: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for an empty list."""
        if not values:
            raise ValueError("no measurement")
        p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
        return cls(mean=float(np.mean(values)), p50=p50, p95=p95, p99=p99, count=len(values))


def spread_of(values: Sequence[float]) -> Spread | None:
    """None for an empty list."""
    return Spread.of(values) if values else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first one left-aligned, the others right-aligned."""
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
    """A table cell with ``digits`` decimals; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """A table cell with four significant digits, for values of any size; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def write_json(path: str | None, report: Any) -> None:
    """Writes a dataclass as indented JSON to the file ``path``; None writes nothing."""
    if path is not None:
        Path(path).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
