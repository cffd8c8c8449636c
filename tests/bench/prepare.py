"""What the benchmarks that run a whole daemon need: its process, and all layers of V4-Flash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from daemon import EINSUMCTL, REPOSITORY, Daemon  # noqa: E402

CHECKPOINT = Path(os.environ.get("EINSUMD_BENCH_DIR", REPOSITORY / "build/bench")) / "v4-flash"


def ctl(*arguments: Any) -> Any:
    """One einsumctl command; its JSON."""
    done = subprocess.run([EINSUMCTL, "--json", *map(str, arguments)], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"einsumctl {' '.join(map(str, arguments))}: exit code {done.returncode}")
    return json.loads(done.stdout)


def v4_flash() -> Path:
    """1.4 GB, written once and read into the page cache, so that no disk is measured."""
    if not (CHECKPOINT / "model.safetensors.index.json").exists():
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
        ctl("make-checkpoint", "--model", "v4-flash", CHECKPOINT)
    for file in sorted(CHECKPOINT.glob("*.safetensors")):
        with file.open("rb") as shard:
            while shard.read(1 << 24):
                pass
    return CHECKPOINT


def start_daemon(directory: Path, checkpoint: Path, wait: bool = True) -> tuple[Daemon, str]:
    """A daemon with the checkpoint on a unix socket; and its address."""
    address = f"unix:{directory}/einsumd.sock"
    daemon = Daemon(
        directory,
        wait=wait,
        listen=[address],
        compute_threads=0,
        weights_roots=[str(checkpoint.parent)],
        weights=[{"path": str(checkpoint)}],
    )
    return daemon, address
