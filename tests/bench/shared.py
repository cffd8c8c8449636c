"""The ways in which a caller on the same host may go, side by side: gRPC over a unix socket, the same
with tensors in shared memory, and the ring. Null engine, two layers of V4-Flash; the cases alternate,
and medians over the rounds are compared."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prepare import EINSUMCTL, Daemon, ctl
from result import Result

ROUNDS = 5
SECONDS = 2
GIB = 1 << 30
# name, transport, tokens, in flight, configuration beyond the usual
CASES = {
    "unix, 1 token, 1 in flight": ("grpc", 1, 1, "usual"),
    "shm, 1 token, 1 in flight": ("shm", 1, 1, "usual"),
    "ring, 1 token, 1 in flight": ("ring", 1, 1, "usual"),
    "ring, 1 token, 1 in flight, nobody spins": ("ring", 1, 1, "no spin"),
    "unix, 1 token, 8 in flight": ("grpc", 1, 8, "usual"),
    "shm, 1 token, 8 in flight": ("shm", 1, 8, "usual"),
    "ring, 1 token, 8 in flight": ("ring", 1, 8, "usual"),
    "unix, 32 tokens, 8 in flight": ("grpc", 32, 8, "usual"),
    "shm, 32 tokens, 8 in flight": ("shm", 32, 8, "usual"),
    "ring, 32 tokens, 8 in flight": ("ring", 32, 8, "usual"),
    "unix, 256 tokens, 8 in flight": ("grpc", 256, 8, "usual"),
    "shm, 256 tokens, 8 in flight": ("shm", 256, 8, "usual"),
    "ring, 256 tokens, 8 in flight": ("ring", 256, 8, "usual"),
}


def start(directory: Path, root: Path, **config: Any) -> Daemon:
    return Daemon(
        directory,
        engine="null",
        listen=[f"unix:{directory}/einsumd.sock"],
        shared_memory_listen=f"unix:{directory}/shared.sock",
        shared_region_bytes_max=GIB,
        shared_bytes_max=4 * GIB,
        weights_roots=[str(root)],
        weights=[{"path": str(root / "checkpoint")}],
        **config,
    )


def bench(daemon: Daemon, transport: str, tokens: int, in_flight: int, spin: bool) -> dict:
    command = ["--endpoint", daemon.address, "bench", "--transport", transport, "--tokens", tokens,
               "--concurrency", in_flight, "--duration", SECONDS, "--warmup", 0.3]  # fmt: skip
    return ctl(*command, *([] if spin else ["--spin", 0]))


def main() -> int:
    result = Result("shared", "calls/s, microseconds and ratios")
    runs: dict[str, list[dict]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(
            [EINSUMCTL, "make-checkpoint", "--layers", "2", root / "checkpoint"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with start(root / "usual", root) as usual, start(root / "none", root, ring_spin_us=0) as none:
            for _ in range(ROUNDS):
                for name, (transport, tokens, in_flight, kind) in CASES.items():
                    daemon = usual if kind == "usual" else none
                    runs[name].append(bench(daemon, transport, tokens, in_flight, kind == "usual"))

    def median(name: str, *path: str) -> float:
        values = []
        for run in runs[name]:
            value: Any = run
            for key in path:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    for name in CASES:
        result.note(f"{name}: calls/s", median(name, "calls_per_s"))
        for point in ("p50", "p99"):
            result.note(f"{name}: {point}, us", median(name, "latency_ns", point) / 1000)
    for tokens, bar in ((32, 8), (256, 40)):
        unix = median(f"unix, {tokens} tokens, 8 in flight", "calls_per_s")
        for transport in ("shm", "ring"):
            case = f"{transport}, {tokens} tokens, 8 in flight"
            # The bar is from below: it is told as what of it is missing.
            ratio = median(case, "calls_per_s") / unix
            result.note(f"{transport} over unix, {tokens} tokens: ratio of calls/s", ratio)
            result.at_most(f"{transport}, {tokens} tokens: bar {bar} over that ratio", bar / ratio, 1)
    result.at_most(
        "ring, p50, us", median("ring, 1 token, 1 in flight", "latency_ns", "p50") / 1000, 25
    )
    result.at_most(
        "ring, p99, us", median("ring, 1 token, 1 in flight", "latency_ns", "p99") / 1000, 60
    )
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
