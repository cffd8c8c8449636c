"""Makes a daemon's allocations fail, one site after the other: see fail_allocations.c."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from daemon import EINSUMD, run

SOURCE = Path(__file__).with_name("fail_allocations.c")
FRAMES, MODULES, SITES, NAME_BYTES = 20, 128, 4096, 56
OFF, RECORD, FAIL = 0, 1, 2


class _Frame(ctypes.Structure):
    _fields_ = [("module", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


class _Site(ctypes.Structure):
    _fields_ = [
        ("hash", ctypes.c_uint64),
        ("owner", ctypes.c_uint32),
        ("hits", ctypes.c_uint32),
        ("what", ctypes.c_char * 16),
        ("frames_n", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("frames", _Frame * FRAMES),
    ]


class _Control(ctypes.Structure):
    _fields_ = [
        ("mode", ctypes.c_uint32),
        ("times", ctypes.c_uint32),
        ("target", ctypes.c_uint64),
        ("failed", ctypes.c_uint32),
        ("modules_n", ctypes.c_uint32),
        ("modules", (ctypes.c_char * NAME_BYTES) * MODULES),
        ("sites", _Site * SITES),
    ]


class Site(NamedTuple):
    """Where something is allocated: its callers, nearest first."""

    hash: int
    what: str
    owner: str
    frames: tuple[tuple[str, int], ...]  # file, offset

    def named(self) -> str:
        """For people: einsumd's frames by function, the others by file."""
        ours = [f"{offset - 1:#x}" for module, offset in self.frames if module == "einsumd"]
        lines = subprocess.run(
            ["addr2line", "-f", "-e", str(EINSUMD), *ours], capture_output=True, text=True
        ).stdout.splitlines()
        names = iter(lines[::2])
        chain = (next(names, "?") if module == "einsumd" else module for module, _ in self.frames)
        return f"{self.what} <- {' <- '.join(chain)}"


def build_shim(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    shim = directory / "fail_allocations.so"
    built = run("cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", shim, SOURCE)
    assert built.returncode == 0, built.stderr
    return shim


class Allocations:
    """What one daemon shares with its test."""

    def __init__(self, shim: Path, file: Path):
        file.write_bytes(bytes(ctypes.sizeof(_Control)))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), ctypes.sizeof(_Control))
        self._control = _Control.from_buffer(self._map)
        # ASan's own library must not insist on being the first: the shim comes before it.
        self.environment = {
            "LD_PRELOAD": str(shim),
            "FAIL_ALLOCATIONS_FILE": str(file),
            "ASAN_OPTIONS": f"{os.environ.get('ASAN_OPTIONS', '')}:verify_asan_link_order=0",
        }

    def record(self) -> None:
        self._control.mode = RECORD

    def off(self) -> None:
        self._control.mode = OFF

    def fail(self, site: Site, times: int = 1) -> None:
        """The next so many allocations at the site."""
        self._control.mode = OFF
        self._control.failed = 0
        self._control.target = site.hash
        self._control.times = times
        self._control.mode = FAIL

    @property
    def failed(self) -> int:
        return self._control.failed

    def sites(self) -> list[Site]:
        """All that were come by since they were last forgotten, nearest callers' file first."""
        names = [bytes(name.value).decode() for name in self._control.modules]
        found = []
        for site in self._control.sites:
            if site.hash == 0 or site.frames_n == 0:
                continue
            frames = tuple(
                (names[frame.module], frame.offset) for frame in site.frames[: site.frames_n]
            )
            # json_alloc of json_limited.c is einsumd's, but jansson is who asks.
            jansson = len(frames) > 1 and frames[1][0].startswith("libjansson")
            owner = frames[1][0] if jansson else names[site.owner]
            found.append(Site(site.hash, site.what.decode(), owner, frames))
        return sorted(found, key=lambda site: site.frames)

    def forget(self) -> None:
        ctypes.memset(ctypes.addressof(self._control.sites), 0, ctypes.sizeof(self._control.sites))
