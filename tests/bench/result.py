"""How a benchmark tells what it found: a table for people, then one line for programs.

    RESULT {"bench": "start", "rows": [{"case": "x", "value": 1, "bar": 3, "sense": "at most",
                                        "ok": true}], "ok": true}

A row without a bar is for information and is always fine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass
class Row:
    case: str
    value: float
    bar: float | None  # what `value` must not pass
    sense: str | None  # "at most" or "at least"
    ok: bool


class Result:
    def __init__(self, bench: str, unit: str):
        self.bench = bench
        self.unit = unit
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}

    def at_most(self, case: str, value: float, bar: float) -> None:
        self.rows.append(Row(case, round(value, 3), round(bar, 3), "at most", value <= bar))

    def at_least(self, case: str, value: float, bar: float) -> None:
        self.rows.append(Row(case, round(value, 3), round(bar, 3), "at least", value >= bar))

    def note(self, case: str, value: float) -> None:
        self.rows.append(Row(case, round(value, 3), None, None, True))

    def skip(self, case: str, reason: str) -> None:
        """Not measured, and why: shown, and no miss."""
        self.skipped[case] = reason

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) and any(row.bar is not None for row in self.rows)

    def print(self) -> int:
        """Returns the exit status."""
        width = max(
            (len(case) for case in [*(r.case for r in self.rows), *self.skipped]), default=4
        )
        print(f"{self.bench}, in {self.unit}")
        print(f"{'case':{width}}  {'value':>12}  {'bar':>21}")
        for row in self.rows:
            bar = "" if row.bar is None else f"{row.sense} {row.bar:12.3f}"
            verdict = "" if row.bar is None else "ok" if row.ok else "MISSED"
            print(f"{row.case:{width}}  {row.value:12.3f}  {bar:>21}  {verdict}")
        for case, reason in self.skipped.items():
            print(f"{case:{width}}  SKIPPED: {reason}")
        summary = {"bench": self.bench, "rows": [asdict(row) for row in self.rows], "ok": self.ok}
        if self.skipped:
            summary["skipped"] = self.skipped
        print("RESULT " + json.dumps(summary))
        return 0 if self.ok else 1
