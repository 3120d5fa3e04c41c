"""What a front says of all its replicas: their metrics in one text, their model entries as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def merged_metrics(texts: Mapping[str, str]) -> str:
    """Metrics in Prometheus's text format. ``texts``: those of each replica, by name.

    Each sample gets the label ``replica``. The lines of one metric stay together, as the format asks for.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # comments and samples
    for replica, text in texts.items():
        comments: list[str] = []
        samples: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                comments, samples = families.setdefault(line.split(" ", 3)[2], ([], []))
            if not line.startswith("#"):
                if line:
                    samples.append(_labelled(line, replica))
            elif line not in comments:
                comments.append(line)
    return "".join(f"{line}\n" for family in families.values() for lines in family for line in lines)


def _labelled(sample: str, replica: str) -> str:
    label = f'replica="{replica}"'
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"


def merged_entry(entries: Iterable[dict[str, Any]], *, waiting: int) -> dict[str, Any] | None:
    """One entry of /v1/models for replicas of one model: that of a ready one, else of any. None without entries.

    It is busy when all are. ``waiting``: the clients in line for a replica.
    """
    known = sorted(entries, key=lambda entry: not entry.get("ready"))
    if not known:
        return None
    ready = [entry for entry in known if entry.get("ready")]
    return known[0] | {
        "busy": all(entry.get("busy") for entry in ready),
        "waiting": waiting,
        "replicas": {"ready": len(ready), "busy": sum(bool(entry.get("busy")) for entry in ready)},
    }
