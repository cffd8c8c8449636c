"""The p99 of 32 honest callers beside each kind of hostile client, over their p99 when left alone.

Honest ones are einsumctl's, each on a connection of its own, 500 requests a second together at random
times; hostile ones are those of tests/integration/hostile.py, from another address, in a process of their
own. Quiet measurements are taken before and after each kind. With --bare the same is asked of gRPC alone
(bare_server), to tell what is the machine's and gRPC's from what is ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import prepare
from hostile import KINDS  # by way of prepare's path
from prepare import BUILD_DIR, EINSUMCTL, REPOSITORY, Daemon
from result import Result

HOSTILE = REPOSITORY / "tests/integration/hostile.py"
CALLERS, RATE = 32, 500


def honest(address: str, seconds: float) -> tuple[float, int]:
    """p99 in us, and how many failed."""
    done = subprocess.run(
        [EINSUMCTL, "--endpoint", address, "--json", "bench", "--tokens", "1",
         "--rate", str(RATE), "--connections", str(CALLERS), "--concurrency", "256",
         "--duration", str(seconds), "--warmup", "0.5"],
        capture_output=True, text=True,
    )  # fmt: skip
    said = json.loads(done.stdout or "{}")
    if "latency_ns" not in said:
        return float("inf"), 1
    return said["latency_ns"]["p99"] / 1e3, sum(said["errors"].values())


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


@contextlib.contextmanager
def bare_server() -> Iterator[tuple[str, int]]:
    program = BUILD_DIR / "tests/bench/bare_server"
    with subprocess.Popen(
        [program, "--weights", "1", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    ) as server:
        address = next(line for line in server.stdout if line.startswith("ready")).split()[1]
        try:
            yield address, server.pid
        finally:
            server.kill()


@contextlib.contextmanager
def daemon() -> Iterator[tuple[str, int]]:
    checkpoint = prepare.v4_flash(1)
    with tempfile.TemporaryDirectory() as folder, Daemon(
        Path(folder), engine="null", self_test_at_start=False, rpc_threads=0,
        weights_roots=[str(checkpoint.parent)], weights=[{"path": str(checkpoint)}],
    ) as it:  # fmt: skip
        yield it.address, it.process.pid


def measure(server: tuple[str, int], kind: str, seconds: float, rounds: int) -> dict:
    address, pid = server
    ratios, failed, beside, quiet = [], 0, [], []
    before_mb = resident_mb(pid)
    peak_mb = before_mb
    for _ in range(rounds):
        first, _ = honest(address, seconds)
        attack = subprocess.Popen(
            [sys.executable, HOSTILE, kind, address, "--seconds", str(seconds + 2)],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(0.5)
        p99, failures = honest(address, seconds)
        peak_mb = max(peak_mb, resident_mb(pid))
        attack.wait()
        time.sleep(0.5)
        last, _ = honest(address, seconds)
        failed += failures
        beside.append(p99)
        quiet.append((first + last) / 2)
        ratios.append(p99 / quiet[-1])
    return {
        "ratio": statistics.median(ratios),
        "beside": statistics.median(beside),
        "quiet": statistics.median(quiet),
        "failed": failed,
        "mb": peak_mb - before_mb,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="hostile.sh", description=__doc__,
        epilog="kinds:\n" + "\n".join(f"  {k:18} {f.__doc__}" for k, f in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="by default all")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement; default 5")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind; default 3")
    parser.add_argument("--bare", action="store_true", help="bare gRPC as well")
    arguments = parser.parse_args()
    unknown = set(arguments.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    result = Result("hostile", "ratios of p99, us and MB")
    for kind in arguments.kinds or KINDS:
        servers = {"einsumd": daemon} | ({"bare gRPC": bare_server} if arguments.bare else {})
        for name, start in servers.items():
            with start() as server:
                try:
                    found = measure(server, kind, arguments.seconds, arguments.rounds)
                except (OSError, ProcessLookupError) as error:
                    result.skip(f"{kind}, {name}", f"the server is gone: {error}")
                    continue
            print(f"{kind}, {name}: {found}", file=sys.stderr, flush=True)
            result.note(f"{kind}, {name}: p99 us, quiet", found["quiet"])
            result.note(f"{kind}, {name}: p99 us, beside it", found["beside"])
            result.note(f"{kind}, {name}: MB more at the end", found["mb"])
            if name == "einsumd":
                result.at_most(f"{kind}, einsumd: p99 beside it over quiet", found["ratio"], 2)
                result.at_most(f"{kind}, einsumd: honest calls that failed", found["failed"], 0)
            else:
                result.note(f"{kind}, {name}: p99 beside it over quiet", found["ratio"])
                result.note(f"{kind}, {name}: honest calls that failed", found["failed"])
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
