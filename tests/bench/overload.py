"""Goodput when 1, 2, 5 and 10 times of what can be computed arrives, in an open loop.

The CPU engine has one thread and batches of 4 requests, so that it is slow and everything around it is not:
the rest of the machine is for the daemon's other threads and the generator. The capacity is what a closed
loop gets. Of each rate: requests answered, memory, and how long a refusal takes from the request's arrival,
whole, to its answer by the daemon's own clock (einsumd_refusal_duration_seconds); and beside it by a stock
Python client that asks one by one, which has the wire and its own share of a busy machine in it.

Percentiles by the daemon are upper ends of buckets, six to a decade.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import prepare
from prepare import EINSUMCTL, REPOSITORY, Daemon, ctl
from result import Result

TIMES = (1, 2, 5, 10)
CONFIG = {
    "engine": "cpu",
    "compute_threads": 1,
    "lanes": 1,
    "batch_requests_max": 4,
    "queue_requests_max": 16,
    "rpc_threads": 1,
    "http_listen": "127.0.0.1:0",
}


class Prober(threading.Thread):
    """Asks one by one, by grpcio, and notes how long refusals took. Without grpcio it notes nothing."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self.address, self.done = address, threading.Event()
        self.refused_ms: list[float] = []

    def run(self) -> None:
        try:
            import grpc
        except ImportError:
            return
        from transport import einsum_frame

        request = einsum_frame(1)[5:]
        options = [("grpc.enable_retries", 0)]
        with grpc.insecure_channel(self.address, options) as channel:
            call = channel.unary_unary("/einsum.v1.Einsum/Einsum")
            while not self.done.wait(0.05):
                begin = time.perf_counter()
                try:
                    call(request, timeout=10)
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self.refused_ms.append((time.perf_counter() - begin) * 1e3)

    def percentile(self, share: float) -> float | None:
        if len(self.refused_ms) < 20:
            return None
        return statistics.quantiles(self.refused_ms, n=100)[round(share * 100) - 1]


def buckets(daemon: Daemon) -> list[tuple[float, float]]:
    """(upper end in seconds, how many so far), cumulative."""
    page = urllib.request.urlopen(f"http://{daemon.http_address}/metrics", timeout=10).read()
    prefix = 'einsumd_refusal_duration_seconds_bucket{le="'
    found = []
    for line in page.decode().splitlines():
        if line.startswith(prefix):
            end, count = line.removeprefix(prefix).split('"} ')
            found.append((float(end), float(count)))
    return found


def percentile_us(before: list, after: list, share: float) -> float | None:
    counts = [(end, now - was) for (end, now), (_, was) in zip(after, before)]
    total = counts[-1][1]
    if total == 0:
        return None
    return next(end for end, count in counts if count >= share * total) * 1e6


def resident_mb(daemon: Daemon) -> float:
    pages = Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]
    return int(pages) * 4096 / 1e6


def offer(daemon: Daemon, rate: float, seconds: float) -> dict:
    """Open loop at `rate`; what came of it."""
    prober = Prober(daemon.address)
    before = buckets(daemon)
    prober.start()
    # Its exit status is that calls were refused, as they should.
    said = subprocess.run(
        [EINSUMCTL, "--endpoint", daemon.address, "--json", "bench", "--tokens", "1",
         "--rate", str(rate), "--connections", "8", "--duration", str(seconds), "--warmup", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    done = json.loads(said.stdout)
    after = buckets(daemon)
    prober.done.set()
    prober.join()
    odd = {code: n for code, n in done["errors"].items() if code != "RESOURCE_EXHAUSTED"}
    if odd:
        sys.exit(f"at {rate:.0f}/s calls ended otherwise than answered or refused: {odd}")
    return {
        "goodput": done["calls_per_s"],
        "refused": sum(done["errors"].values()) / seconds,
        "p50": percentile_us(before, after, 0.5),
        "p99": percentile_us(before, after, 0.99),
        "client_p50": prober.percentile(0.5),
        "client_p99": prober.percentile(0.99),
        "mb": resident_mb(daemon),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="overload.sh", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=8, help="of each rate; default 8")
    parser.add_argument("--rounds", type=int, default=3, help="of all rates; default 3")
    arguments = parser.parse_args()
    # The client that the tests have, where this Python has none.
    sys.path += map(str, (REPOSITORY / "build/venv/lib").glob("python3*/site-packages"))
    result = Result("overload", "the unit that each row names")
    checkpoint = prepare.v4_flash(1)
    taken: dict[int, list[dict]] = {times: [] for times in TIMES}
    with tempfile.TemporaryDirectory() as folder, Daemon(
        Path(folder), weights_roots=[str(checkpoint.parent)],
        weights=[{"path": str(checkpoint)}], **CONFIG,
    ) as daemon:  # fmt: skip

        def closed_loop() -> float:
            return ctl(
                "--endpoint", daemon.address, "bench", "--tokens", 1, "--concurrency", 12,
                "--connections", 8, "--duration", arguments.seconds, "--warmup", 1,
            )["calls_per_s"]  # fmt: skip

        capacity = statistics.median(closed_loop() for _ in range(arguments.rounds))
        quiet_mb = resident_mb(daemon)
        for _ in range(arguments.rounds):
            for times in TIMES:
                taken[times].append(offer(daemon, times * capacity, arguments.seconds))

    def median(times: int, what: str) -> float | None:
        values = [run[what] for run in taken[times] if run[what] is not None]
        return statistics.median(values) if values else None

    goodput = {times: median(times, "goodput") for times in TIMES}
    result.note("capacity, closed loop, requests/s", capacity)
    for times in TIMES:
        result.note(f"{times}x offered: answered/s", goodput[times])
        result.note(f"{times}x offered: refused/s", median(times, "refused"))
        for what, label in (
            ("p50", "refusal p50 us, daemon"), ("p99", "refusal p99 us, daemon"),
            ("client_p50", "refusal p50 ms, Python client"),
            ("client_p99", "refusal p99 ms, Python client"), ("mb", "resident MB"),
        ):  # fmt: skip
            value = median(times, what)
            if value is not None and not (what == "p99" and times == 10):
                result.note(f"{times}x offered: {label}", value)
    peak = max(goodput.values())
    result.at_least("goodput at 10x over peak", goodput[10] / peak, 0.9)
    result.at_most("refusal p99 us at 10x, daemon", median(10, "p99"), 1000)
    result.at_most("resident MB at 10x, less before", median(10, "mb") - quiet_mb, 64)
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
