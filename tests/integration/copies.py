"""Counts the bytes that a daemon copies, without its help: see count_copies.c."""

from __future__ import annotations

import struct
from pathlib import Path

from daemon import run

SOURCE = Path(__file__).with_name("count_copies.c")


class Copies:
    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        shim = directory / "count_copies.so"
        built = run("cc", "-shared", "-fPIC", "-O2", "-Wall", "-o", shim, SOURCE)
        assert built.returncode == 0, built.stderr
        self.file = directory / "copies"
        self.file.write_bytes(bytes(16))
        self.environment = {"LD_PRELOAD": str(shim), "COUNT_COPIES_FILE": str(self.file)}

    def bytes(self) -> int:
        """Copied so far."""
        return struct.unpack("<QQ", self.file.read_bytes())[1]
