"""What the benchmarks that run a whole daemon need: its process, and layers of V4-Flash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from daemon import BUILD_DIR, EINSUMCTL, REPOSITORY, Daemon  # noqa: E402

__all__ = ["BENCH_DIR", "BUILD_DIR", "EINSUMCTL", "REPOSITORY", "Daemon"]
BENCH_DIR = Path(os.environ.get("EINSUMD_BENCH_DIR", REPOSITORY / "build/bench"))


def ctl(*arguments: Any) -> Any:
    """One einsumctl command; its JSON."""
    done = subprocess.run([EINSUMCTL, "--json", *map(str, arguments)], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"einsumctl {' '.join(map(str, arguments))}: exit code {done.returncode}")
    return json.loads(done.stdout)


def v4_flash(layers: int = 43) -> Path:
    """33.5 MB a layer, written once and read into the page cache, so that no disk is measured."""
    checkpoint = BENCH_DIR / ("v4-flash" if layers == 43 else f"v4-flash-{layers}")
    if not (checkpoint / "model.safetensors.index.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        ctl("make-checkpoint", "--model", "v4-flash", "--layers", layers, checkpoint)
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as shard:
            while shard.read(1 << 24):
                pass
    return checkpoint


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
