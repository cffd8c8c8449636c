"""What looking on costs: calls with a scrape of /metrics every second against calls without, on one
daemon, in turn; and, where EINSUMD_BASELINE_DIR names another build, that one beside it. Null engine,
two layers of V4-Flash. Besides calls/s, which others on the machine disturb, calls for each second of
the daemon's CPU time are compared."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from prepare import BUILD_DIR, EINSUMCTL, Daemon, ctl
from result import Result

ROUNDS = int(os.environ.get("EINSUMD_BENCH_ROUNDS", 9))
SECONDS = 3
BASELINE = os.environ.get("EINSUMD_BASELINE_DIR")
# name, transport, tokens, in flight
CASES = {
    "unix, 1 token, 8 in flight": ("grpc", 1, 8),
    "ring, 1 token, 1 in flight": ("ring", 1, 1),
    "ring, 1 token, 8 in flight": ("ring", 1, 8),
}


def start(directory: Path, root: Path, **config: Any) -> Daemon:
    return Daemon(
        directory,
        engine="null",
        listen=[f"unix:{directory}/einsumd.sock"],
        shared_memory_listen=f"unix:{directory}/shared.sock",
        weights_roots=[str(root)],
        weights=[{"path": str(root / "checkpoint")}],
        **config,
    )


class Scraper(threading.Thread):
    """Asks for the page once a second until told to stop."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self.url = f"http://{address}/metrics"
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(1):
            urllib.request.urlopen(self.url, timeout=10).read()

    def stop(self) -> None:
        self.done.set()
        self.join()


def cpu_seconds(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench(daemon: Daemon, case: str, scraped: bool) -> tuple[float, float]:
    """Calls a second, and calls for each second of the daemon's CPU time."""
    transport, tokens, in_flight = CASES[case]
    scraper = Scraper(daemon.http_address) if scraped else None
    if scraper:
        scraper.start()
    before = cpu_seconds(daemon)
    done = ctl("--endpoint", daemon.address, "bench", "--transport", transport, "--tokens", tokens,
               "--concurrency", in_flight, "--duration", SECONDS, "--warmup", 0.2)  # fmt: skip
    cpu = cpu_seconds(daemon) - before
    if scraper:
        scraper.stop()
    return done["calls_per_s"], done["calls_per_s"] * SECONDS / cpu


def page_value(daemon: Daemon, name: str) -> float:
    page = urllib.request.urlopen(f"http://{daemon.http_address}/metrics", timeout=10).read()
    return next(float(x.split()[1]) for x in page.decode().splitlines() if x.startswith(name + " "))


def main() -> int:
    result = Result("metrics", "calls/s, ratios and microseconds")
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(
            [EINSUMCTL, "make-checkpoint", "--layers", "2", root / "checkpoint"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        ours = start(root / "ours", root, http_listen="127.0.0.1:0")
        kinds = {"alone": (ours, False), "scraped": (ours, True)}
        if BASELINE:
            sys.modules[Daemon.__module__].EINSUMD = Path(BASELINE).resolve() / "einsumd"
            kinds["baseline"] = (start(root / "other", root), False)
        for _ in range(ROUNDS):
            for case in CASES:
                for kind, (daemon, scraped) in kinds.items():
                    runs.setdefault((case, kind), []).append(bench(daemon, case, scraped))
        scrapes = page_value(ours, "einsumd_scrapes_total")
        scrape_us = page_value(ours, "einsumd_scrape_seconds_total") / scrapes * 1e6
        for daemon in {id(daemon): daemon for daemon, _ in kinds.values()}.values():
            daemon.stop()

    def ratio(case: str, over: str, under: str, which: int) -> float:
        """Median over the rounds of a ratio taken within each."""
        pairs = zip(runs[case, over], runs[case, under])
        return statistics.median(a[which] / b[which] for a, b in pairs)

    for case in CASES:
        for kind in kinds:
            result.note(f"{case}, {kind}: calls/s",
                        statistics.median(run[0] for run in runs[case, kind]))  # fmt: skip
        result.note(f"{case}: scraped over alone, calls/s", ratio(case, "scraped", "alone", 0))
        result.note(f"{case}: scraped over alone, calls/CPU s", ratio(case, "scraped", "alone", 1))
        if BASELINE:
            result.note(f"{case}: alone over baseline, calls/s", ratio(case, "alone", "baseline", 0))
            result.note(
                f"{case}: alone over baseline, calls/CPU s", ratio(case, "alone", "baseline", 1)
            )
    # A scrape a second takes this share of one core, and cannot cost more calls than that.
    result.at_most("one scrape, us", scrape_us, 10_000)
    record = subprocess.run([BUILD_DIR / "tests/bench/record"], capture_output=True, text=True)
    print(record.stdout.strip())
    result.at_most("following one request, ns", float(record.stdout.split()[2]), 400)
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
