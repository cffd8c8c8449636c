"""Strangers at the TLS port: each fails in the handshake, gRPC sees nothing of him, and who is in
already does not notice."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import pytest

from client import EINSUM, HEALTH, Client
from conftest import Site, serving, small_weights
from daemon import SCALE, count, seconds, wait_until
from pki import Authority, Files, Pair
from raw_http2 import (
    PREFACE,
    SETTINGS,
    RawConnection,
    call_headers,
    frame,
    message,
)
from scrape import scrape

HANDSHAKE_MS = 700


class Port:
    def __init__(self, folder: Path, site: Site, authority: Authority):
        self.folder, self.site, self.authority = folder, site, authority
        self.ours = authority.issue("ours")
        host, port = site.daemon.host_port
        self.address = ("127.0.0.1", port)
        self.target = f"localhost:{port}"
        self.files = 0

    def context(self, pair: Pair | None, protocols: list[str] | None = None) -> ssl.SSLContext:
        """A client's; without a certificate if `pair` is None."""
        context = ssl.create_default_context(cadata=self.authority.certificate.decode())
        if protocols is None:
            protocols = ["h2"]
        if protocols:
            context.set_alpn_protocols(protocols)
        if pair:
            self.files += 1
            path = self.folder / f"client{self.files}.pem"
            path.write_bytes(pair.certificate + pair.key)
            context.load_cert_chain(path)
        return context

    def talk(self, context: ssl.SSLContext) -> bytes:
        """Does the handshake, says HTTP/2's hello, and returns what comes until the end."""
        with socket.create_connection(self.address, 20) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                secure.sendall(PREFACE + frame(SETTINGS, 0, 0))
                return secure.recv(65536)

    def figures(self) -> tuple[float, float]:
        """Handshakes refused; calls and connections that gRPC has seen."""
        page = scrape(self.site.daemon)
        refused = sum(
            page.total("einsumd_tls_handshakes_total", result=result)
            for result in ("failed", "late")
        )
        seen = page.total("einsumd_grpc_calls_total") + page.total(
            "einsumd_tls_handshakes_total", result="done"
        )
        return refused, seen

    def settled(self) -> tuple[float, float]:
        """Once what came before has been counted: calls are a moment after their replies."""
        figures = self.figures()
        while True:
            time.sleep(0.1)
            before, figures = figures, self.figures()
            if figures == before:
                return figures


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    folder = tmp_path_factory.mktemp("port")
    authority, files = Authority("our authority"), Files(folder / "tls")
    files.write_pair(authority.server())
    files.client_ca.write_bytes(authority.certificate)
    with serving(
        folder, small_weights(), 256, listen=[f"unix:{folder}/s.sock", "127.0.0.1:0"],
        http_listen="127.0.0.1:0", tls_handshake_ms=HANDSHAKE_MS,
        **files.config(client_ca=True),
    ) as site:  # fmt: skip
        yield Port(folder, site, authority)


def old_version(port: Port) -> ssl.SSLContext:
    context = port.context(port.ours)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


STRANGERS: dict[str, Callable[[Port], ssl.SSLContext]] = {
    "no certificate": lambda port: port.context(None),
    "another authority": lambda port: port.context(Authority("theirs").issue("ours")),
    "an authority of our name": lambda port: port.context(Authority("our authority").issue("ours")),
    "expired": lambda port: port.context(port.authority.issue("ours", expired=True)),
    "TLS 1.1": old_version,
    "no ALPN": lambda port: port.context(port.ours, []),
    "HTTP/1.1": lambda port: port.context(port.ours, ["http/1.1"]),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stranger_fails_in_the_handshake(port: Port, stranger: str) -> None:
    refused, seen = port.settled()
    try:
        said = port.talk(STRANGERS[stranger](port))
        assert said == b"", said  # TLS 1.3: the client is done before the server has judged it
    except (ssl.SSLError, ConnectionError):
        pass
    wait_until(lambda: port.figures()[0] == refused + 1)
    assert port.figures()[1] == seen


def test_ours_gets_in(port: Port, rng: np.random.Generator) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = port.context(port.ours)
        context.minimum_version = context.maximum_version = version
        assert port.talk(context)[3:4] == b"\4", version  # SETTINGS
    credentials = port.authority.credentials(port.ours)
    with Client(port.target, port.site.client.schema, credentials=credentials) as client:
        port.site.check_serves(rng, client)


def test_plain_text_is_refused(port: Port) -> None:
    refused, seen = port.figures()
    with RawConnection(port.address) as raw:
        raw.hello()
        raw.send(call_headers(f"/{HEALTH}/Check"))
        assert raw.closed_by_peer()
    wait_until(lambda: port.figures()[0] == refused + 1)
    assert port.figures()[1] == seen


@pytest.mark.parametrize("first", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
def test_a_slow_handshake_is_given_up(port: Port, first: bytes) -> None:
    """One byte at a time does not make it last longer."""
    refused, seen = port.figures()
    started = time.monotonic()
    with RawConnection(port.address) as raw:
        raw.socket.settimeout(0.05)
        if first:
            raw.send(first)
        while True:
            assert time.monotonic() < started + seconds(10)
            try:
                if raw.socket.recv(1) == b"":
                    break
            except TimeoutError:
                with contextlib.suppress(OSError):
                    raw.send(b"\x00" if first else b"")
            except ConnectionError:
                break
    assert time.monotonic() - started > HANDSHAKE_MS / 1000 * 0.9 or first
    wait_until(lambda: port.figures()[0] == refused + 1)
    assert port.figures()[1] == seen


def test_strangers_leave_nothing(port: Port) -> None:
    """Neither descriptors nor connections, however they go."""

    def left() -> tuple[float, float]:
        page = scrape(port.site.daemon)
        return page.total("einsumd_connections"), page.total("process_open_fds")

    connections, descriptors = left()
    for number in range(count(100)):
        raw = RawConnection(port.address)
        if number % 3 == 0:
            raw.send(b"\x16\x03\x01")
        raw.reset() if number % 2 else raw.socket.close()
    wait_until(lambda: left()[0] <= connections and left()[1] <= descriptors + 2)


def test_a_flood_of_handshakes_beside_a_caller(port: Port, rng: np.random.Generator) -> None:
    stop = threading.Event()

    def flood() -> None:
        context = port.context(None)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                port.talk(context)

    request = port.site.good_request(rng)
    credentials = port.authority.credentials(port.ours)
    with Client(port.target, port.site.client.schema, credentials=credentials) as client:
        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(count(100)):
                client.einsum(request)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_peer_that_does_not_read(port: Port, rng: np.random.Generator) -> None:
    """Its connection fills up and holds nothing else up; what it holds goes with it."""
    page = scrape(port.site.daemon)
    resident = page.total("process_resident_memory_bytes")
    request = port.site.good_request(rng, 500).SerializeToString()
    path, body = f"/{EINSUM}/Einsum", message(request)
    stalled = []
    for _ in range(8):
        plain = socket.create_connection(port.address, 20)
        secure = port.context(port.ours).wrap_socket(plain, server_hostname="localhost")
        settings = frame(SETTINGS, 0, 0, b"\x00\x04\x7f\xff\xff\xff")  # all may come at once
        window = frame(8, 0, 0, b"\x7f\x00\x00\x00")
        secure.sendall(PREFACE + settings + window)
        greeting = b""
        while len(greeting) < 52:  # its own windows, of some megabytes
            greeting += secure.recv(65536)
        pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)]
        for stream in (1, 3, 5):
            data = [frame(0, 0, stream, piece) for piece in pieces[:-1]]
            data.append(frame(0, 1, stream, pieces[-1]))
            secure.sendall(call_headers(path, stream) + b"".join(data))
        stalled.append(secure)
    credentials = port.authority.credentials(port.ours)
    with Client(port.target, port.site.client.schema, credentials=credentials) as client:
        for _ in range(count(10)):
            port.site.check_serves(rng, client)
    if SCALE == 1:
        grown = scrape(port.site.daemon).total("process_resident_memory_bytes") - resident
        assert grown < 256 << 20
    for secure in stalled:
        secure.close()
    wait_until(lambda: scrape(port.site.daemon).total("einsumd_connections") <= 2)
