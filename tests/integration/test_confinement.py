"""What the daemon does to itself at its start, so that little is to be had from it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterator

import daemon
import pytest
from daemon import Daemon

USER = 65534  # nobody


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One that another user may enter, with the daemon in it."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        monkeypatch.setattr(daemon, "EINSUMD", shutil.copy(daemon.EINSUMD, path / "einsumd"))
        yield path


def start(directory: Path, **config: object) -> Daemon:
    wrapper = []
    if os.geteuid() == 0:  # to whom everything belongs, dumpable or not
        wrapper = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    return Daemon(directory, wrapper=wrapper, engine="null", **config)


def belongs_to_root(process: int) -> bool:
    """As the kernel has it of processes that leave no core and that nobody may trace."""
    return Path(f"/proc/{process}/environ").stat().st_uid == 0


def test_it_gains_no_rights_and_leaves_no_core(directory: Path) -> None:
    with start(directory) as running:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
        assert belongs_to_root(running.process.pid)


def test_it_leaves_a_core_where_it_is_told_to(directory: Path) -> None:
    with start(directory, core_dumps=True) as running:
        assert not belongs_to_root(running.process.pid)
