"""tests/soak.sh: for half a minute as a test of itself, and as long as it is meant to."""

from __future__ import annotations

import subprocess

import pytest

import soak
from daemon import REPOSITORY, environment


def windows(n: int, **of: object) -> dict:
    """A result of n windows, in which nothing happens but for what is given by window."""
    steady = {"p99_us": 900.0, "p50_us": 300.0, "control_p99_us": 450.0, "resident": 100 << 20,
              "fds": 40, "threads": 18, "load": 1.0}  # fmt: skip
    return {
        "windows": [steady | {key: value(i) for key, value in of.items()} for i in range(n)],
        "before": (0, 20, 18), "after": (0, 20, 18), "calls": {}, "failures": [],
    }  # fmt: skip


@pytest.mark.parametrize("of, finds", [
    ({}, []),
    ({"resident": lambda i: (100 << 20) + (i % 3 << 20)}, []),  # up and down
    ({"resident": lambda i: (100 << 20) + (i << 17)}, ["resident memory grows"]),
    ({"resident": lambda i: (100 << 20) + (min(i, 6) << 22)}, []),  # while it warms up
    ({"fds": lambda i: 40 + i // 8}, ["descriptors grow"]),
    ({"threads": lambda i: 18 + i // 16}, ["threads grow"]),
    ({"p99_us": lambda i: 900 + 5 * i}, ["p99 drifts by more than 10 %"]),
    # The machine's, and single windows of any size.
    ({"p99_us": lambda i: 900 + 5 * i, "control_p99_us": lambda i: 450 + 2.5 * i}, []),
    ({"p99_us": lambda i: 90000 if i % 5 == 0 else 900}, []),
])  # fmt: skip
def test_verdict(of: dict, finds: list[str]) -> None:
    assert soak.verdict(windows(40, **of), 10)[1] == finds


def test_verdict_on_failures_and_what_is_left_open() -> None:
    result = windows(40)
    assert soak.verdict(result | {"after": (0, 21, 18)}, 10)[1] == ["descriptors grow"]
    assert soak.verdict(result | {"failures": ["unary: wrong"]}, 10)[1] == ["unary: wrong"]
    assert soak.verdict(windows(0), 10)[1] == ["nothing was measured"]


def run_soak(seconds: int, drift: int) -> None:
    result = subprocess.run(
        [REPOSITORY / "tests/soak.sh", "--seconds", str(seconds), "--drift", str(drift)],
        env=environment(), capture_output=True, text=True, timeout=seconds * 2 + 300,
    )  # fmt: skip
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_soak() -> None:
    run_soak(600, drift=10)
