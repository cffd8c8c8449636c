"""A Debian 12 of its own: a root file system over a base that debootstrap made once, with what is
installed there, and booted with systemd as its first process (systemd-nspawn).

The base lies in build/packages and is made anew when a day old. Everything here needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from daemon import REPOSITORY, run, wait_until
from must import must

BASE = REPOSITORY / "build/packages/debian12"
BASE_AGE_MAX_S = 24 * 3600  # its lists of packages go stale
SUITE = "bookworm"
NSPAWN = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--directory"]
QUIET_APT = ["--setenv=DEBIAN_FRONTEND=noninteractive"]


def why_not() -> str | None:
    """What keeps machines from being made here."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("debootstrap", "systemd-nspawn"):
        if not shutil.which(program):
            return f"no {program}: deploy/install-dependencies.sh --packages"
    return None


def mirror() -> str:
    """Where this machine's own packages come from."""
    found = must("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)",
                 "Created-By: Packages")  # fmt: skip
    for line in found.splitlines():
        release, component, uri = line.split()
        if (release, component) == (SUITE, "main"):
            return uri
    raise AssertionError(f"this machine has no source of {SUITE}:\n{found}")


def base() -> Path:
    """A minimal Debian 12, made once; it installs from where this machine does, as it does."""
    made = BASE / "made"
    if made.exists() and time.time() - made.stat().st_mtime < BASE_AGE_MAX_S:
        return BASE
    shutil.rmtree(BASE, ignore_errors=True)
    BASE.parent.mkdir(parents=True, exist_ok=True)
    must("debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, BASE, mirror(),
         timeout=600)  # fmt: skip
    acquire = must("apt-config", "dump", "Acquire")
    (BASE / "etc/apt/apt.conf.d/90acquire").write_text(acquire)
    must(*NSPAWN, BASE, "--as-pid2", "apt-get", "-qq", "update", timeout=300)
    made.touch()
    return BASE


def first_process(nspawn: subprocess.Popen) -> int:
    """Its number here. While nspawn prepares it, another's or 0: what enters it then fails."""
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
    return int(children[0]) if children else 0


class Machine:
    """Use as a context manager. What it writes is gone with it."""

    def __init__(self) -> None:
        BASE.parent.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="machine-", dir=BASE.parent))
        for name in ("root", "upper", "work"):
            (self.directory / name).mkdir()
        self.root = self.directory / "root"
        layers = f"upperdir={self.directory}/upper,workdir={self.directory}/work"
        must("mount", "-t", "overlay", "-o", f"lowerdir={base()},{layers}", "overlay", self.root)
        self.nspawn: subprocess.Popen | None = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.halt()
        must("umount", self.root)
        shutil.rmtree(self.directory)

    def boot(self) -> None:
        with (self.directory / "console").open("wb") as console:
            self.nspawn = subprocess.Popen(
                [*NSPAWN, self.root, "--private-network", "--boot"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_until(
            lambda: self.try_("systemctl", "is-system-running").stdout.strip() in
            ("running", "degraded"),
            timeout=60, what="booted",
        )  # fmt: skip

    def halt(self) -> None:
        if not self.nspawn:
            return
        self.nspawn.send_signal(signal.SIGTERM)  # an orderly shutdown
        try:
            self.nspawn.wait(60)
        except subprocess.TimeoutExpired:
            self.nspawn.kill()
            self.nspawn.wait()
        self.nspawn = None

    def try_(self, *arguments: object, timeout: float = 60) -> subprocess.CompletedProcess:
        """Runs a program there, booted or not."""
        if self.nspawn:
            namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
            enter = ["nsenter", f"--target={first_process(self.nspawn)}", *namespaces, "--"]
        else:
            enter = [*NSPAWN, str(self.root), "--as-pid2", *QUIET_APT]
        return run(*enter, *arguments, timeout=timeout)

    def do(self, *arguments: object, timeout: float = 60) -> str:
        """The same, and it must succeed; its standard output."""
        done = self.try_(*arguments, timeout=timeout)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
        return done.stdout

    def journal(self) -> str:
        return self.try_("journalctl", "--unit=einsumd", "--no-pager", "--output=cat").stdout
