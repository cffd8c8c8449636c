"""Running what must succeed."""

from __future__ import annotations

from daemon import run


def must(*arguments: object, timeout: float = 60, **options: object) -> str:
    """Runs a program that must succeed; its standard output."""
    done = run(*arguments, timeout=timeout, **options)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done.stdout
