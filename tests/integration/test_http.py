"""The HTTP interface: probes as Kubernetes sends them, and callers who mean no good."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest

from conftest import Site, serving, small_weights
from daemon import EINSUMD, Daemon, run, seconds, wait_until
from scrape import ask, ask_raw, connect, parse_answer, read_all, scrape

CONNECTIONS_MAX = 8
TIMEOUT_S = 10  # of a connection, in the daemon


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(
        tmp_path_factory.mktemp("http"), small_weights(1), 256,
        http_listen="127.0.0.1:0", http_connections_max=CONNECTIONS_MAX,
    ) as site:  # fmt: skip
        yield site


def test_probes(site: Site) -> None:
    live, ready = ask(site.daemon, "/livez"), ask(site.daemon, "/readyz")
    assert (live.status, live.text) == (200, "live\n")
    assert (ready.status, ready.text) == (200, "ready\n")
    assert ask(site.daemon, "/readyz?verbose=1").status == 200
    assert ready.headers["cache-control"] == "no-store"
    head = ask(site.daemon, "/livez", "HEAD")
    assert head.status == 200 and head.body == b""


def test_build_info(site: Site) -> None:
    answer = ask(site.daemon, "/buildinfo")
    assert answer.headers["content-type"] == "application/json"
    info = site.client.call("ServerInfo")
    assert json.loads(answer.text) == {
        "version": info.version, "engine": info.engine,
        "device": info.device, "kernel": info.kernel,
    }  # fmt: skip
    assert run(EINSUMD, "--version").stdout.strip() == f"einsumd {info.version}"


def test_not_found(site: Site) -> None:
    for path in ("/", "/metric", "/metrics/", "/../metrics", "//metrics", "/livez%00", "*"):
        answer = ask(site.daemon, path)
        assert answer.status in (400, 404), path
        if answer.status == 404 and path != "*":
            assert "/metrics" in answer.text  # says what there is


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO"])
def test_methods(site: Site, method: str) -> None:
    answer = ask(site.daemon, "/metrics", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "get, head"


def test_body_is_not_read(site: Site) -> None:
    """Refused by its head: nobody waits for a gigabyte."""
    for headers in ("Content-Length: 1073741824", "Transfer-Encoding: chunked"):
        head = f"POST /metrics HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n"
        assert parse_answer(ask_raw(site.daemon, head.encode())).status == 405


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",  # no Host
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET /%zz%s%n HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\x00\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # a gRPC client that came to the wrong port
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        bytes(range(256)) * 16,
        b"GET / HTTP/1.1\r\n" * 100,
    ],
)
def test_garbage(site: Site, rng: np.random.Generator, request_bytes: bytes) -> None:
    with connect(site.daemon.http_address) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)
    assert ask(site.daemon, "/readyz").status == 200
    site.check_serves(rng)


def test_size_limits(site: Site) -> None:
    long_path = ask(site.daemon, "/" + "a" * 100_000)
    assert long_path.status in (413, 414, 431)
    many = "".join(f"x-{i}: {'b' * 100}\r\n" for i in range(1000))
    raw = ask_raw(site.daemon, f"GET /livez HTTP/1.1\r\nHost: a\r\n{many}\r\n".encode())
    assert not raw or parse_answer(raw).status in (413, 431)
    assert ask(site.daemon, "/livez").status == 200


def test_connection_limit(site: Site) -> None:
    """Those past the limit are closed, the others are served, and room comes back."""
    idle = [connect(site.daemon.http_address) for _ in range(CONNECTIONS_MAX)]
    wait_until(lambda: ask_raw(site.daemon, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n") == b"")
    idle[0].sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    assert parse_answer(read_all(idle[0])).status == 200
    for connection in idle:
        connection.close()

    def serves() -> bool:
        raw = ask_raw(site.daemon, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        return raw != b"" and parse_answer(raw).status == 200

    wait_until(serves)


def test_slow_callers(site: Site) -> None:
    """One that sends nothing, and one that sends a byte now and then: both are cut off in time."""
    silent, dripping = connect(site.daemon.http_address), connect(site.daemon.http_address)
    started = time.monotonic()
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 10_000
    dripping.settimeout(0.5)
    ended = False
    for byte in request:
        try:
            dripping.send(bytes([byte]))
            ended = dripping.recv(100) == b""
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            ended = True
        if ended or time.monotonic() - started > seconds(3 * TIMEOUT_S):
            break
    assert ended
    assert time.monotonic() - started >= TIMEOUT_S - 1
    read_all(silent)  # which fails unless it has been ended
    silent.close()
    dripping.close()
    assert ask(site.daemon, "/livez").status == 200


def test_reader_that_does_not_read(site: Site) -> None:
    """Its page stays unsent, and nobody else notices."""
    stuck = connect(site.daemon.http_address)
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    stuck.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    assert ask(site.daemon, "/metrics").status == 200
    stuck.close()
    assert ask(site.daemon, "/metrics").status == 200


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with Daemon(tmp_path, http_listen=f"unix:{path}") as daemon:
        assert ask(daemon, "/livez").status == 200
        assert "einsumd_ready 1" in ask(daemon, "/metrics").text
    assert not path.exists()


def test_off_by_default(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        assert daemon.http_address == ""


def test_taken_address(tmp_path: Path) -> None:
    with Daemon(tmp_path / "a", http_listen="127.0.0.1:0") as daemon:
        other = Daemon(tmp_path / "b", wait=False, http_listen=daemon.http_address)
        assert other.wait_exit() == 1
        assert f"http_listen: {daemon.http_address} is in use by another process" in other.log


def test_drain(tmp_path: Path, rng: np.random.Generator) -> None:
    """Not ready from the signal on, alive and scraped to the end, and no idle caller delays it."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", lame_duck_ms=1500
    ) as site:
        idle = connect(site.daemon.http_address)
        assert ask(site.daemon, "/readyz").status == 200
        site.daemon.terminate()
        wait_until(lambda: ask(site.daemon, "/readyz").status == 503)
        assert ask(site.daemon, "/readyz").text == "not ready: draining\n"
        assert ask(site.daemon, "/livez").status == 200
        assert scrape(site.daemon).value("einsumd_ready") == 0
        site.check_serves(rng)
        started = time.monotonic()
        assert site.daemon.wait_exit() == 0
        assert time.monotonic() - started < seconds(6)
        assert read_all(idle) == b""
        idle.close()
