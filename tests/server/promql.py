"""Reads the queries of dashboards and alerts, and compares them with what a server serves under /metrics.

The part of PromQL that they use: selectors with matchers and a range, functions, ``sum by (...)`` and its like,
arithmetic and comparisons. Anything else is an error, so that a query that is not understood is not taken for right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

TARGET_LABELS = frozenset({"instance", "job"})
"""Labels that Prometheus adds to every sample."""

ANY_VALUE = {"$instance"}  # dashboard variables
RANGE_FUNCTIONS = ("rate", "increase")
AGGREGATIONS = ("sum", "max", "min", "avg")
CALLS = (*RANGE_FUNCTIONS, "absent", "histogram_quantile")
_TOKEN = re.compile(
    r'\s*("(?:[^"\\]|\\.)*"|\[\$__rate_interval\]|\[\d+[smhd]\]|\d+(?:\.\d+)?(?:e\d+)?|\w+|=~|!~|!=|==|>=|<=|[-+*/<>={}(),])'
)


class WrongQuery(Exception):
    pass


@dataclass(frozen=True)
class Vector:
    labels: frozenset[str]
    is_range: bool = False
    is_counter: bool = False


class Served:
    """The samples of an exposition: label names and values by name."""

    def __init__(self, exposition: str) -> None:
        self.samples: dict[str, list[dict[str, str]]] = {}
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append(sample.labels)

    def check(self, query: str) -> frozenset[str]:
        """The labels of what the query gives. Raises WrongQuery."""
        reader = _Reader(query, self)
        found = reader.expression()
        reader.end()
        if not isinstance(found, Vector) or found.is_range:
            raise WrongQuery(f"{query}: gives no instant vector")
        return found.labels


class _Reader:
    def __init__(self, query: str, served: Served) -> None:
        self._served = served
        self._tokens: list[str] = []
        at, query = 0, query.strip()
        while at < len(query):
            match = _TOKEN.match(query, at)
            if match is None:
                raise WrongQuery(f"{query}: not understood from {query[at : at + 20]!r} on")
            self._tokens.append(match[1])
            at = match.end()

    def end(self) -> None:
        if self._tokens:
            raise WrongQuery(f"{self._tokens} is left")

    def expression(self) -> Vector | float:
        left = self._sum()
        while self._next() in ("==", "!=", "<", ">", "<=", ">="):
            self._take()
            left = self._both(left, self._sum())
        return left

    def _sum(self) -> Vector | float:
        left = self._term()
        while self._next() in ("+", "-", "*", "/"):
            self._take()
            left = self._both(left, self._term())
        return left

    def _both(self, left: Vector | float, right: Vector | float) -> Vector | float:
        vectors = [side for side in (left, right) if isinstance(side, Vector)]
        if any(each.is_range for each in vectors):
            raise WrongQuery("an operator on a range")
        if len({each.labels for each in vectors}) > 1:
            raise WrongQuery(f"the sides have labels {[sorted(each.labels) for each in vectors]}")
        return Vector(vectors[0].labels) if vectors else 0.0

    def _term(self) -> Vector | float:
        token = self._take()
        if token == "(":
            inner = self.expression()
            self._take(")")
            return inner
        if token[0].isdigit():
            return float(token)
        if token in AGGREGATIONS:
            return self._aggregation()
        if token in CALLS:
            return self._call(token)
        return self._selector(token)

    def _aggregation(self) -> Vector:
        self._take("by")
        labels = frozenset(self._list())
        self._take("(")
        inner = self.expression()
        self._take(")")
        if not isinstance(inner, Vector) or not labels <= inner.labels:
            raise WrongQuery(f"by {sorted(labels)}: there is only {inner}")
        return Vector(labels)

    def _list(self) -> list[str]:
        self._take("(")
        names = [self._take()]
        while self._next() == ",":
            self._take()
            names.append(self._take())
        self._take(")")
        return names

    def _call(self, name: str) -> Vector:
        self._take("(")
        if name == "histogram_quantile":
            quantile = self.expression()
            self._take(",")
            if not isinstance(quantile, float):
                raise WrongQuery("a quantile is a number")
        inner = self.expression()
        self._take(")")
        if not isinstance(inner, Vector) or inner.is_range != (name in RANGE_FUNCTIONS):
            raise WrongQuery(f"{name} of {inner}")
        if name in RANGE_FUNCTIONS and not inner.is_counter:
            raise WrongQuery(f"{name} of what is no counter")
        if name == "histogram_quantile" and "le" not in inner.labels:
            raise WrongQuery("histogram_quantile without le")
        return Vector(inner.labels - {"le"} if name == "histogram_quantile" else inner.labels)

    def _selector(self, name: str) -> Vector:
        samples = self._served.samples.get(name)
        if not samples:
            raise WrongQuery(f"{name} is not served")
        labels = frozenset(samples[0]) | TARGET_LABELS
        if self._next() == "{":
            self._take()
            while self._next() != "}":
                self._matcher(name, samples, labels)
                if self._next() == ",":
                    self._take()
            self._take("}")
        is_range = self._next().startswith("[")
        if is_range:
            self._take()
        return Vector(labels, is_range, name.endswith(("_total", "_bucket", "_sum", "_count")))

    def _matcher(self, name: str, samples: list[dict[str, str]], labels: frozenset[str]) -> None:
        label, operator, value = self._take(), self._take(), self._take().strip('"')
        if label not in labels or operator not in ("=", "=~"):
            raise WrongQuery(f"{name}: no label {label}, it has {sorted(labels)}")
        for wanted in value.split("|") if operator == "=~" else [value]:
            if label not in TARGET_LABELS and wanted not in {each[label] for each in samples} | ANY_VALUE:
                raise WrongQuery(f"{name}: {label} has no value {wanted}")

    def _next(self) -> str:
        return self._tokens[0] if self._tokens else ""

    def _take(self, expected: str | None = None) -> str:
        token = self._tokens.pop(0) if self._tokens else ""
        if not token or (expected is not None and token != expected):
            raise WrongQuery(f"{token!r}, expected {expected or 'more'}")
        return token
