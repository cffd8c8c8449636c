"""Memory that the daemon holds: no more than it says, and no more after many requests than after
the first."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from prepare import ctl, start_daemon, v4_flash
from result import Result

WARM_UP_REQUESTS = 3_000
REQUESTS = 10_000
TOKENS = "1,2,1,8,1,3,1,32,1,1"  # of one request after the other
BAR_GROWTH_PERCENT = 2.0
# Code, stacks, gRPC's buffers for what is on its way, and the C library's slack.
REST_BYTES = 128 << 20
MIB = 1 << 20


def memory_bytes(pid: int, field: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.M).group(1))


def load(address: str, requests: int) -> None:
    """Exits if any call fails; what is refused for lack of room is tried again."""
    ctl(
        "--endpoint", address, "bench", "--requests", requests, "--duration", 3600, "--warmup", 0,
        "--concurrency", 16, "--tokens", TOKENS, "--mixed", "--retry",
    )  # fmt: skip


def main() -> int:
    checkpoint = v4_flash()
    result = Result("memory", "MiB, growth in percent")
    with tempfile.TemporaryDirectory() as directory:
        daemon, address = start_daemon(Path(directory), checkpoint)
        with daemon:
            pid = daemon.process.pid
            stated = ctl("--endpoint", address, "info")["memory"]
            bar = sum(stated.values()) + REST_BYTES
            result.note("weights, as stated", stated["weights_bytes"] / MIB)
            result.note("batches and scratch, as stated",
                        (stated["batches_bytes"] + stated["scratch_bytes"]) / MIB)  # fmt: skip
            loaded = memory_bytes(pid, "VmRSS")
            result.at_most("resident, loaded", loaded / MIB, bar / MIB)
            load(address, WARM_UP_REQUESTS)
            warm = memory_bytes(pid, "VmRSS")
            result.at_most(f"resident, after {WARM_UP_REQUESTS} requests", warm / MIB, bar / MIB)
            load(address, REQUESTS)
            after = memory_bytes(pid, "VmRSS")
            result.at_most(f"resident, after {REQUESTS} more", after / MIB, bar / MIB)
            # Files are mapped while they are loaded; those pages are the page cache's.
            result.note("highest ever, with files mapped", memory_bytes(pid, "VmHWM") / MIB)
            growth = 100 * (after - warm) / warm
            result.at_most("growth after warm-up, percent", growth, BAR_GROWTH_PERCENT)
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
