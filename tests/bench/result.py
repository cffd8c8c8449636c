"""How a benchmark tells what it found: a table for people, then one line for programs.

    RESULT {"bench": "start", "rows": [{"case": "x", "value": 1, "bar": 3, "ok": true}], "ok": true}

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
    ok: bool


class Result:
    def __init__(self, bench: str, unit: str):
        self.bench = bench
        self.unit = unit
        self.rows: list[Row] = []

    def at_most(self, case: str, value: float, bar: float) -> None:
        self.rows.append(Row(case, round(value, 3), round(bar, 3), value <= bar))

    def note(self, case: str, value: float) -> None:
        self.rows.append(Row(case, round(value, 3), None, True))

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) and any(row.bar is not None for row in self.rows)

    def print(self) -> int:
        """Returns the exit status."""
        width = max(len(row.case) for row in self.rows)
        print(f"{self.bench}, in {self.unit}")
        print(f"{'case':{width}}  {'value':>12}  {'at most':>12}")
        for row in self.rows:
            bar = "" if row.bar is None else f"{row.bar:12.3f}"
            verdict = "" if row.bar is None else "ok" if row.ok else "MISSED"
            print(f"{row.case:{width}}  {row.value:12.3f}  {bar:>12}  {verdict}")
        summary = {"bench": self.bench, "rows": [asdict(row) for row in self.rows], "ok": self.ok}
        print("RESULT " + json.dumps(summary))
        return 0 if self.ok else 1
