"""out/gpu.json: a file that is whole after every figure, that a later run can add to; and what the figures must be."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Report:
    """A JSON object in a file; read again before every change, since each part of a run is a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return content

    def add(self, name: str, value: object) -> None:
        """Puts `value` at `name`. An interruption leaves the old file or the new one."""
        content = {**self.read(), name: value}
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


class Section:
    """One part's rows."""

    def __init__(self, report: Report, name: str, *, resume: bool) -> None:
        """resume: rows that are there already are kept, and need not be measured again."""
        self._report, self._name = report, name
        self.rows: list[Row] = list(report.read().get(name, [])) if resume else []

    def has(self, **wanted: object) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._report.add(self._name, self.rows)


@dataclass(frozen=True)
class Target:
    """A figure at the 7B shape on an H100 with 80 GB, and what it must be."""

    what: str
    must: str
    measured: float | None
    met: bool | None  # None: not measured


def targets(content: dict[str, Any], window: int) -> list[Target]:
    """What the report says about each; of several rows that fit, the best one counts."""
    step, full = content.get("step", []), {"context_frames": window, "kv": "bfloat16"}
    prefill: list[Row] = [row for row in content.get("prefill", []) if row["others"] == 31]
    held = [row["most"] for row in content.get("capacity", []) if row["kv"].startswith("float8")]
    return [
        _at_most("frame step at 32 sessions, ms", 30.0, _values(step, "step_ms", slots=32, **full)),
        _at_most("frame step at 1 session, ms", 8.0, _values(step, "step_ms", slots=1, **full)),
        _at_least("sessions held at p99 80 ms, fp8 KV, codecs beside it", 72, held),
        _at_most("prompt to ready beside 31, ms", 250.0, _values(prefill, "ready_ms", what="prompt, uncached")),
        _at_most("the same, cached, ms", 80.0, _values(prefill, "ready_ms", what="prompt, cached")),
        _at_most("journal to live beside 31, ms", 1_500.0, _values(prefill, "ready_ms", what="journal, cached prompt")),
    ]


def _values(rows: Sequence[Row], name: str, **wanted: object) -> list[float]:
    return [row[name] for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _at_most(what: str, limit: float, values: Sequence[float]) -> Target:
    best = min(values, default=None)
    return Target(what, f"<= {limit:g}", best, None if best is None else best <= limit)


def _at_least(what: str, limit: float, values: Sequence[float]) -> Target:
    best = max(values, default=None)
    return Target(what, f">= {limit:g}", best, None if best is None else best >= limit)
