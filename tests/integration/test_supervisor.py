"""What a supervisor hears by systemd's notification protocol: a datagram socket stands for it."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Iterator

import pytest

from checkpoints import write_checkpoint
from client import Client
from conftest import small_weights
from daemon import Daemon, seconds, wait_until


def fields(message: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in message.decode().splitlines())


class Supervisor:
    """Keeps what it is told, in order of arrival."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.environment = {"NOTIFY_SOCKET": str(self.path)}
        self.heard: list[dict[str, str]] = []

    def next(self, timeout: float = 30) -> dict[str, str]:
        self.socket.settimeout(seconds(timeout))
        self.heard.append(fields(self.socket.recv(4096)))
        return self.heard[-1]

    def wait_for(self, field: str) -> dict[str, str]:
        while True:
            message = self.next()
            if field in message:
                return message

    def rest(self) -> list[dict[str, str]]:
        """What has arrived by now, without waiting."""
        self.socket.setblocking(False)
        try:
            while True:
                self.heard.append(fields(self.socket.recv(4096)))
        except BlockingIOError:
            return self.heard


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "supervisor")
    with supervisor.socket:
        yield supervisor


def test_ready_only_when_it_serves(tmp_path: Path, supervisor: Supervisor) -> None:
    model = write_checkpoint(tmp_path / "model", small_weights())
    with Daemon(
        tmp_path,
        extra_environment=supervisor.environment,
        wait=False,
        weights_roots=[str(tmp_path)],
        weights=[{"path": str(model), "output_dim": 256}],
    ) as daemon:
        ready = supervisor.wait_for("READY")
        assert ready["READY"] == "1"
        address = ready["STATUS"].removeprefix("serving on ")
        with Client(address) as client:  # at once: nothing is waited for
            assert client.health() == 1
            assert len(client.call("ListWeights").weights) == 2
        daemon.wait_ready()
        assert address == daemon.address
    assert "STOPPING" in supervisor.rest()[-1]


def test_stopping_says_how_long_it_may_take(tmp_path: Path, supervisor: Supervisor) -> None:
    with Daemon(
        tmp_path,
        extra_environment=supervisor.environment,
        lame_duck_ms=300,
        drain_grace_ms=70_000,
    ) as daemon:
        supervisor.wait_for("READY")
        daemon.terminate()
        told = supervisor.wait_for("STOPPING")
        assert daemon.process.poll() is None, "told before the lame duck's time"
        assert told["STOPPING"] == "1"
        assert int(told["EXTEND_TIMEOUT_USEC"]) >= (300 + 70_000) * 1000


def test_a_failed_start_is_never_ready(tmp_path: Path, supervisor: Supervisor) -> None:
    daemon = Daemon(
        tmp_path,
        extra_environment=supervisor.environment,
        wait=False,
        weights_roots=[str(tmp_path)],
        weights=[{"path": "not-there"}],
    )
    assert daemon.wait_exit() == 1
    assert not any("READY" in message for message in supervisor.rest())


def test_watchdog_hears_of_a_loop_that_is_alive_and_of_no_other(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    period = seconds(1.0)
    environment = supervisor.environment | {"WATCHDOG_USEC": str(int(period * 1e6))}
    with Daemon(tmp_path, extra_environment=environment) as daemon:
        supervisor.wait_for("WATCHDOG")
        before = time.monotonic()
        for _ in range(4):
            supervisor.wait_for("WATCHDOG")
        assert time.monotonic() - before < 4 * period, "heard less often than was asked"

        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            supervisor.rest()
            with pytest.raises(TimeoutError):
                supervisor.next(1.5)
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
        supervisor.wait_for("WATCHDOG")


def test_nobody_asked(tmp_path: Path, supervisor: Supervisor) -> None:
    """Another process's watchdog is not ours, and without a socket nothing is sent."""
    environment = {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"} | supervisor.environment
    with Daemon(tmp_path / "other", extra_environment=environment):
        supervisor.wait_for("READY")
        time.sleep(0.2)
    assert not any("WATCHDOG" in message for message in supervisor.rest())

    heard = len(supervisor.heard)
    with Daemon(tmp_path / "none", extra_environment={"WATCHDOG_USEC": "1000000"}) as daemon:
        wait_until(lambda: daemon.address)
    assert len(supervisor.rest()) == heard
