"""Asks the daemon's HTTP interface as probes and Prometheus do, and reads the page."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from daemon import Daemon, seconds

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        target: Any = address.removeprefix("unix:")
    else:
        connection = socket.socket(socket.AF_INET)
        host, port = address.rsplit(":", 1)
        target = (host, int(port))
    connection.settimeout(seconds(30))
    connection.connect(target)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Up to the end that the daemon sets; one that resets the connection ends it, too."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


def parse_answer(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), headers, body)


def ask_raw(daemon: Daemon, request: bytes) -> bytes:
    with connect(daemon.http_address) as connection:
        try:
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may answer before it has read all
        return read_all(connection)


def ask(daemon: Daemon, path: str, method: str = "GET", **headers: str) -> Answer:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return parse_answer(ask_raw(daemon, "\r\n".join([*lines, "", ""]).encode()))


def check_with_promtool(text: str) -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text, capture_output=True, text=True, timeout=seconds(60),
    )  # fmt: skip
    assert result.returncode == 0 and not result.stderr, result.stdout + result.stderr


@dataclass
class Page:
    """What one scrape says."""

    text: str
    families: dict[str, Any] = field(default_factory=dict)  # by the name in TYPE
    samples: dict[tuple, float] = field(default_factory=dict)

    def value(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        """Of all samples that have these labels, whatever else they have."""
        wanted = set(labels.items())
        return sum(v for (n, have), v in self.samples.items() if n == name and wanted <= have)

    def has(self, name: str, **labels: str) -> bool:
        return (name, frozenset(labels.items())) in self.samples


def read_page(text: str, openmetrics: bool = False) -> Page:
    read = openmetrics_parser if openmetrics else parser
    page = Page(text)
    for family in read.text_string_to_metric_families(text):
        assert family.name not in page.families, f"{family.name} is there twice"
        page.families[family.name] = family
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in page.samples, f"{key} is there twice"
            page.samples[key] = sample.value
    return page


def scrape(daemon: Daemon) -> Page:
    answer = ask(daemon, "/metrics")
    assert answer.status == 200, answer
    return read_page(answer.text)
