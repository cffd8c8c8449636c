"""Runs the daemon as an operator would: a configuration file, a ready event, SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Sequence

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD_DIR = Path(os.environ.get("EINSUMD_BUILD_DIR", REPOSITORY / "build/release")).resolve()
EINSUMD = BUILD_DIR / "einsumd"
EINSUMCTL = BUILD_DIR / "einsumctl"
EINSUMD_FAULTS = BUILD_DIR / "tests/einsumd_faults"  # its "null" engine: engine_faulty.c


def default_scale() -> float:
    """Sanitizers make a build some 5 to 10 times slower."""
    cache = BUILD_DIR / "CMakeCache.txt"
    sanitized = cache.exists() and re.search(r"^EINSUMD_SANITIZE:\w+=.", cache.read_text(), re.M)
    return 0.2 if sanitized else 1.0


# Below 1 for slow builds: fewer random cases, longer waits.
SCALE = float(os.environ.get("EINSUMD_TEST_SCALE") or default_scale())
ENGINE = os.environ.get("EINSUMD_TEST_ENGINE", "cpu")

SANITIZER_REPORT = re.compile(
    r"(Address|Thread|Leak|UndefinedBehavior)Sanitizer|runtime error:|assertion .* failed", re.I
)


def count(n: int) -> int:
    """How often to do what is done n times in a release build."""
    return max(2, round(n * SCALE))


def seconds(s: float) -> float:
    """How long to wait for what takes at most s in a release build."""
    return s * max(1.0, 1.0 / SCALE)


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """gRPC's own code is not instrumented, so TSan must not judge what happens inside it."""
    defaults = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    return defaults | dict(os.environ) | (extra or {})


def run(*arguments: Any, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess:
    """Runs a program to its end, text in and out."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True, text=True, timeout=seconds(timeout), env=environment(), **options,
    )  # fmt: skip


class Daemon:
    """One daemon process. Use as a context manager: leaving it stops the daemon and judges it."""

    def __init__(
        self,
        directory: Path,
        extra_environment: dict[str, str] | None = None,
        wait: bool = True,
        wrapper: Sequence[str] = (),
        program: Path = EINSUMD,
        **config: Any,
    ):
        """`directory` gets the configuration; `config` holds its keys; `wrapper` is a command that
        becomes the daemon."""
        defaults = {
            "listen": ["127.0.0.1:0"],
            "engine": ENGINE,
            "compute_threads": 2,
            "rpc_threads": 2,
            "tcp_scopes": ["infer", "read", "admin"],  # by default loading is off on TCP
        }
        self.config = defaults | config | {"log_format": "json"}
        directory.mkdir(parents=True, exist_ok=True)
        self.config_path = directory / "einsumd.json"
        self.config_path.write_text(json.dumps(self.config, indent=2))
        self.lines: list[str] = []
        self.events: list[dict] = []
        self._changed = threading.Condition()
        self._ended = False
        self.told_to_stop = False
        self.process = subprocess.Popen(
            [*wrapper, program, "--config", self.config_path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(extra_environment),
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if wait:
            self.wait_ready()

    def _read_log(self) -> None:
        for raw in self.process.stderr:
            line = raw.decode(errors="replace").rstrip("\n")
            # What gRPC or a sanitizer writes does not start like ours; what does must be JSON.
            event = json.loads(line) if line.startswith("{") else None
            with self._changed:
                self.lines.append(line)
                if event:
                    self.events.append(event)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_event(self, message: str, timeout: float = 30) -> dict:
        """The first event of that name in the log."""

        def find() -> dict | None:
            return next((event for event in self.events if event["msg"] == message), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or self._ended, seconds(timeout))
            event = find()
        if event is None:
            code = self.process.poll()
            self.process.kill()
            raise AssertionError(f'no event "{message}" (exit code {code}); log:\n{self.log}')
        return event

    def wait_ready(self) -> None:
        ready = self.wait_event("ready")
        self.listening = ready["listen"].split(",")
        self.http_address = ready.get("http_listen", "")  # "": none

    @property
    def address(self) -> str:
        """Where it listens first, with the real port."""
        return self.listening[0]

    @property
    def host_port(self) -> tuple[str, int]:
        tcp = next(address for address in self.listening if not address.startswith("unix:"))
        host, port = tcp.rsplit(":", 1)
        return host, int(port)

    def terminate(self) -> None:
        self.told_to_stop = True
        self.process.send_signal(signal.SIGTERM)

    def wait_exit(self, timeout: float = 45) -> int:
        code = self.process.wait(seconds(timeout))
        self._reader.join(seconds(5))
        return code

    def kill(self) -> None:
        """As the kernel's out-of-memory killer would: no chance to tidy up."""
        self.process.kill()
        self.wait_exit()

    def stop(self) -> None:
        """SIGTERM must end it with 0, and no sanitizer may have complained."""
        if self.process.poll() is None:
            self.terminate()
        try:
            code = self.wait_exit()
        except subprocess.TimeoutExpired:
            # An abort leaves more to look at than a kill.
            self.process.send_signal(signal.SIGABRT)
            self.wait_exit()
            raise AssertionError(f"SIGTERM did not end the daemon; log:\n{self.log}") from None
        assert not SANITIZER_REPORT.search(self.log), f"sanitizer report:\n{self.log}"
        assert code == 0, f"exit code {code}; log:\n{self.log}"

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.stop()
        elif self.process.poll() is None:
            self.kill()


def wait_until(condition: Any, timeout: float = 10, what: str = "") -> Any:
    """Polls until `condition` returns something true."""
    deadline = time.monotonic() + seconds(timeout)
    while not (result := condition()):
        assert time.monotonic() < deadline, f"did not come true in time: {what or condition}"
        time.sleep(0.02)
    return result
