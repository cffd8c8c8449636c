"""Daemons on hosts of their own: network namespaces on one bridge, and a namespace for who calls.

    hub (198.51.100.254): nginx, clients        host 0 (198.51.100.1)   host 1 ...
        `----------------------- bridge -----------'---------------------'
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import pytest

from daemon import REPOSITORY, Daemon, run, seconds, wait_until

PORT = 50061  # as in the files under deploy/
NGINX_CONFIG = REPOSITORY / "deploy/nginx/einsumd.conf"


class Network:
    """Namespaces for a hub and its hosts, gone at the end."""

    hub_address = "198.51.100.254"

    def __init__(self, hosts: int):
        self.hub = f"einsumd-{os.getpid()}-hub"
        self.hosts = [f"einsumd-{os.getpid()}-{i}" for i in range(hosts)]
        self.addresses = [f"198.51.100.{i + 1}" for i in range(hosts)]

    def _ip(self, *arguments: str) -> None:
        result = run("ip", *arguments)
        if result.returncode != 0:
            raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")

    def _attach(self, index: int) -> None:
        host = self.hosts[index]
        self._ip("netns", "add", host)
        self._ip("link", "add", f"host{index}", "netns", self.hub, "type", "veth",
                 "peer", "name", "eth0", "netns", host)  # fmt: skip
        self._ip("-n", self.hub, "link", "set", f"host{index}", "master", "bridge", "up")
        self._ip("-n", host, "addr", "add", f"{self.addresses[index]}/24", "dev", "eth0")
        self._ip("-n", host, "link", "set", "eth0", "up")
        self._ip("-n", host, "link", "set", "lo", "up")

    def __enter__(self) -> Network:
        if not shutil.which("ip"):
            pytest.skip("no ip (Debian: iproute2)")
        try:
            self._ip("netns", "add", self.hub)
            self._ip("-n", self.hub, "link", "set", "lo", "up")
            self._ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self.hub, "addr", "add", f"{self.hub_address}/24", "dev", "bridge")
            self._ip("-n", self.hub, "link", "set", "bridge", "up")
            for index in range(len(self.hosts)):
                self._attach(index)
        except OSError as error:
            self.__exit__()
            pytest.skip(f"network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN): {error}")
        return self

    def __exit__(self, *_: Any) -> None:
        for name in [*self.hosts, self.hub]:
            run("ip", "netns", "del", name)

    @staticmethod
    def inside(namespace: str) -> list[str]:
        """A command's prefix: it keeps its process id, so signals reach what it becomes."""
        return ["ip", "netns", "exec", namespace]


class Nginx:
    """nginx with the configuration that is in deploy/, its daemons' names replaced by addresses."""

    def __init__(self, directory: Path, network: Network):
        if not shutil.which("nginx"):
            pytest.skip("no nginx (Debian: nginx)")
        text = NGINX_CONFIG.read_text()
        for index, address in enumerate(network.addresses):
            text, found = re.subn(rf"\beinsumd-{index + 1}:", f"{address}:", text)
            assert found == 1, f"{NGINX_CONFIG} names einsumd-{index + 1} {found} times"
        directory.mkdir()
        (directory / "einsumd.conf").write_text(text)
        (directory / "nginx.conf").write_text(
            f"daemon off; worker_processes 2; pid {directory}/pid; error_log stderr notice;\n"
            "events {}\n"
            f"http {{ access_log off; include {directory}/einsumd.conf;\n"
            + "".join(
                f"{kind}_temp_path {directory}/{kind};\n"
                for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + "}\n"
        )
        self.log_path = directory / "log"
        self.command = [*network.inside(network.hub), "nginx", "-c", str(directory / "nginx.conf")]
        self.network = network

    def __enter__(self) -> Nginx:
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=log)
        wait_until(lambda: "start worker process" in self.log_path.read_text()
                   or self.process.poll() is not None, what="nginx")  # fmt: skip
        assert self.process.poll() is None, self.log_path.read_text()
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(seconds(10))

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Its workers get no CPU within."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        workers = [int(pid) for pid in children.split()]
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGCONT)


class Host:
    """One daemon in its namespace, which may be stopped and started again."""

    def __init__(self, network: Network, index: int, directory: Path, **config: Any):
        self.network, self.index, self.directory = network, index, directory
        self.socket = f"unix:{directory}/einsumd.sock"  # to be asked from outside, past all else
        # Nobody else is in the network.
        listen = {"listen": [self.socket, f"0.0.0.0:{PORT}"], "insecure_listen": True}
        self.config = listen | config
        self.start()

    def start(self) -> None:
        inside = self.network.inside(self.network.hosts[self.index])
        self.daemon = Daemon(self.directory, wrapper=inside, **self.config)

    def restart(self) -> None:
        self.daemon.stop()
        self.start()

    @property
    def address(self) -> str:
        return f"{self.network.addresses[self.index]}:{PORT}"
