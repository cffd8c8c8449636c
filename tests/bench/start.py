"""How long from exec until the first health check succeeds, with all 43 layers of V4-Flash."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prepare import EINSUMCTL, start_daemon, v4_flash
from result import Result

ROUNDS = 5
BAR_S = 3.0
GIVE_UP_S = 60.0


def time_start(directory: Path, checkpoint: Path) -> tuple[float, float]:
    """Seconds as a prober sees it, and as the daemon's log has it."""
    begin = time.monotonic()
    daemon, address = start_daemon(directory, checkpoint, wait=False)
    with daemon:
        probe = [EINSUMCTL, "--endpoint", address, "--timeout", "1000", "health"]
        while subprocess.run(probe, capture_output=True).returncode != 0:
            if time.monotonic() - begin > GIVE_UP_S:
                sys.exit(f"not healthy after {GIVE_UP_S} s; log:\n{daemon.log}")
            time.sleep(0.01)
        took = time.monotonic() - begin
        return took, daemon.wait_event("ready")["ms"] / 1000


def main() -> int:
    checkpoint = v4_flash()
    result = Result("start", "seconds")
    seen, logged = [], []
    for index in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            took, by_log = time_start(Path(directory), checkpoint)
        result.note(f"exec to healthy, round {index + 1}", took)
        seen.append(took)
        logged.append(by_log)
    result.note("until ready by the log, median", statistics.median(logged))
    result.at_most("exec to healthy, median", statistics.median(seen), BAR_S)
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
